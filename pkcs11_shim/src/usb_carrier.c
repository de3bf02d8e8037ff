#include "usb_carrier.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "descriptors.h"

#define STACK (256u << 10) /* the thread needs little, but the program's thread-local variables count */
#define SETTLE_MS 3000     /* for transfers that were cancelled: the kernel gives them back at once, or something is broken */

/* ---- transfers ---- */

/* Called in handle_events, by the thread alone. */
static void done(struct libusb_transfer *transfer)
{
    struct usb *usb = transfer->user_data;
    struct half *half = transfer == usb->in.transfer ? &usb->in : &usb->out;
    half->under_way = false;
    if (transfer->status != LIBUSB_TRANSFER_COMPLETED || transfer->actual_length < 0 || transfer->actual_length > transfer->length)
        usb->lost = true; /* a halt is the module's end of the connection */
    else if (half == &usb->in)
        half->end = (size_t)transfer->actual_length;
    else if (transfer->actual_length)
        half->start += (size_t)transfer->actual_length;
    else
        usb->lost = true; /* takes nothing, and would be asked for ever */
}

static void submit(struct usb *usb, struct half *half, uint8_t endpoint, size_t length)
{
    struct libusb_transfer *transfer = half->transfer;
    transfer->device = usb->device;
    transfer->type = LIBUSB_TRANSFER_TYPE_BULK;
    transfer->endpoint = endpoint;
    transfer->buffer = half->data + half->start;
    transfer->length = (int)length;
    transfer->callback = done;
    transfer->user_data = usb;
    half->under_way = usb->libusb->submit_transfer(transfer) == 0;
    usb->lost |= !half->under_way;
}

/* Forgets what went on: it may have been a PIN. */
static void emptied(struct half *half)
{
    explicit_bzero(half->data, half->end);
    half->start = half->end = 0;
}

/* What came, to the socket.  Returns false when that is full; or ended, as poll will say. */
static bool deliver(struct usb *usb)
{
    struct half *in = &usb->in;
    while (!in->under_way && in->start < in->end) {
        ssize_t sent = send(usb->socket, in->data + in->start, in->end - in->start, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
        in->start += sent < 0 ? 0 : (size_t)sent;
    }
    return true;
}

/* From the module to the socket, and the next transfer. */
static void pass_in(struct usb *usb)
{
    if (usb->in.under_way || !deliver(usb) || usb->lost)
        return;
    emptied(&usb->in);
    submit(usb, &usb->in, usb->channel.in, PIECE);
}

/* From the socket to the module. */
static void pass_out(struct usb *usb)
{
    struct half *out = &usb->out;
    if (out->under_way || usb->lost)
        return;
    if (out->start == out->end) {
        emptied(out);
        ssize_t got = recv(usb->socket, out->data, PIECE, MSG_DONTWAIT);
        if (got <= 0)
            return; /* nothing; or ended, as poll will say */
        out->end = (size_t)got;
    }
    submit(usb, out, usb->channel.out, out->end - out->start);
}

static void handle_events(struct usb *usb)
{
    struct timeval now = {0};
    usb_library_lock();
    int result = usb->libusb->handle_events_timeout_completed(usb->context, &now, NULL);
    usb_library_unlock();
    if (result && result != LIBUSB_ERROR_INTERRUPTED)
        usb->lost = true;
}

/* ---- the thread ---- */

/* Sleeps until something can go on.  Returns false when the library has given the connection up. */
static bool await(struct usb *usb)
{
    struct pollfd fds[1 + MOST_WATCHED] = {{.fd = usb->socket, .events = POLLRDHUP}};
    if (!usb->out.under_way)
        fds[0].events |= POLLIN;
    if (!usb->in.under_way)
        fds[0].events |= POLLOUT;
    memcpy(fds + 1, usb->watched, usb->watching * sizeof *fds);
    if (poll(fds, 1 + usb->watching, -1) < 0)
        return errno == EINTR;
    bool events = false, gone = false;
    for (nfds_t i = 1; i <= usb->watching; i++) {
        events |= fds[i].revents != 0;
        gone |= (fds[i].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0;
    }
    if (events)
        handle_events(usb);
    usb->lost |= gone; /* libusb looks at it no more, and poll would not sleep again */
    return !(fds[0].revents & (POLLRDHUP | POLLHUP | POLLERR));
}

static int64_t now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

/* Cancels what is under way and waits for it. */
static void settle(struct usb *usb)
{
    int64_t until = now_ms() + SETTLE_MS;
    if (usb->in.under_way)
        usb->libusb->cancel_transfer(usb->in.transfer);
    if (usb->out.under_way)
        usb->libusb->cancel_transfer(usb->out.transfer);
    for (;;) {
        handle_events(usb);
        if ((!usb->in.under_way && !usb->out.under_way) || now_ms() >= until)
            return;
        poll(usb->watched, usb->watching, 10);
    }
}

void usb_give_up(struct usb *usb)
{
    bool settled = !usb->in.under_way && !usb->out.under_way;
    if (usb->claimed)
        usb->libusb->release_interface(usb->device, usb->channel.interface);
    usb_library_lock();
    if (settled) { /* else libusb still knows the transfers, and has to keep all of it */
        usb->libusb->free_transfer(usb->in.transfer);
        usb->libusb->free_transfer(usb->out.transfer);
        if (usb->device)
            usb->libusb->close(usb->device);
        if (usb->context)
            usb->libusb->exit(usb->context);
        usb->watching = 0;
    }
    descriptors_lock();
    if (usb->node >= 0)
        close(usb->node);
    if (usb->socket >= 0)
        close(usb->socket);
    usb->node = usb->socket = -1;
    descriptors_unlock();
    usb_library_unlock();
}

static void *carry(void *argument)
{
    struct usb *usb = argument;
    do {
        pass_in(usb);
        pass_out(usb);
    } while (!usb->lost && await(usb) && !usb->lost);
    deliver(usb);                     /* an answer that came just before the end */
    shutdown(usb->socket, SHUT_RDWR); /* whoever waits for one need not wait for what follows */
    settle(usb);
    usb_give_up(usb);
    return NULL;
}

/* No signal of the program is handled there: a handler may need its own stack, or what its thread has. */
int usb_carry(struct usb *usb)
{
    sigset_t none, before;
    pthread_attr_t small;
    sigfillset(&none);
    pthread_attr_init(&small);
    pthread_sigmask(SIG_SETMASK, &none, &before);
    int error = pthread_attr_setstacksize(&small, STACK);
    if (!error)
        error = pthread_create(&usb->thread, &small, carry, usb);
    if (error == EINVAL) /* more thread-local variables than that */
        error = pthread_create(&usb->thread, NULL, carry, usb);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&small);
    if (!error)
        pthread_setname_np(usb->thread, "hsmvisor-usb");
    return error;
}
