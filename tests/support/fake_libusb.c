/* libusb-1.0.so.0 for machines without USB: what libhsmvisor-pkcs11.so uses of it, with a module's unix socket for each open channel.
 *
 * A device is a file that holds the path of its module's socket.  Claims are locks of the open file (F_OFD_SETLK), one byte for each
 * interface: as usbfs's, they are shared with children that have the descriptor, and end with an explicit release or the last close.
 * Alternate setting 1 connects, 0 and a release disconnect.  A module that hangs up is a halted endpoint, or no device any more when
 * its file is gone.
 *
 * What an application must not do ends the process with a word about it: calls on a context of its parent's, transfers freed or devices
 * closed while something is under way, contexts that end with devices.
 *
 * FAKE_USB_PIECE: the most bytes that a transfer carries.  FAKE_USB_STUCK: cancelled transfers never come back.  FAKE_USB_GONE: a module
 * that hangs up is told at once, with the last data.
 * With -DNEWER it has what 1.0.27 brought. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "usb_library.h"

#define DEMAND(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "fake libusb: line %d: %s\n", __LINE__, #what); \
            abort(); \
        } \
    } while (0)

enum { STALL = 4, NO_DEVICE = 5, CANCELLED = 3, ERROR_IO = -1, ERROR_PIPE = -9 };

struct context {
    pid_t pid;
    int poll, event; /* an epoll that holds the wire and the event */
    int devices;
    int discovers;
    pthread_t discovery;
};

struct device {
    struct context *context;
    int file, claimed, wire; /* claimed, wire: -1 = none */
    struct transfer *in, *out;
    struct device *next;
};

struct transfer {
    struct device *device; /* where it is under way */
    int cancelled;
    struct libusb_transfer public;
};

static struct device *all;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of `all`, as libusb has its own */
static int no_discovery;
static pthread_mutex_t discovery_lock = PTHREAD_MUTEX_INITIALIZER;

/* The kernel's end of a channel is not inherited. */
static void child(void)
{
    pthread_mutex_init(&lock, NULL);
    for (struct device *d = all; d; d = d->next)
        if (d->wire >= 0)
            close(d->wire);
    all = NULL;
}

__attribute__((constructor)) static void load(void)
{
    pthread_atfork(NULL, NULL, child);
}

/* ---- contexts ---- */

static void *discover(void *argument)
{
    (void)argument;
    pthread_mutex_lock(&discovery_lock); /* until the context ends */
    pthread_mutex_unlock(&discovery_lock);
    return NULL;
}

static int begin(void **result, int quiet)
{
    struct context *c = calloc(1, sizeof *c);
    c->pid = getpid();
    c->poll = epoll_create1(EPOLL_CLOEXEC);
    c->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(c->poll, EPOLL_CTL_ADD, c->event, &event);
    if (!quiet) {
        c->discovers = 1;
        pthread_mutex_trylock(&discovery_lock);
        pthread_create(&c->discovery, NULL, discover, NULL);
        pthread_setname_np(c->discovery, "libusb_event");
    }
    *result = c;
    return 0;
}

int libusb_init(void **context)
{
    return begin(context, no_discovery);
}

#ifdef NEWER
int libusb_init_context(void **context, const struct libusb_init_option *options, int count)
{
    DEMAND(count == 1 && options->option == LIBUSB_OPTION_NO_DEVICE_DISCOVERY);
    return begin(context, 1);
}
#endif

int libusb_set_option(void *context, int option, ...)
{
    DEMAND(!context && option == LIBUSB_OPTION_NO_DEVICE_DISCOVERY);
    no_discovery = 1;
    return 0;
}

void libusb_exit(void *context)
{
    struct context *c = context;
    DEMAND(c->pid == getpid() && !c->devices);
    if (c->discovers) {
        pthread_mutex_unlock(&discovery_lock);
        pthread_join(c->discovery, NULL);
    }
    close(c->poll);
    close(c->event);
    free(c);
}

const struct libusb_pollfd **libusb_get_pollfds(void *context)
{
    struct context *c = context;
    DEMAND(c->pid == getpid());
    struct libusb_pollfd *fds = calloc(2, sizeof *fds);
    const struct libusb_pollfd **list = calloc(3, sizeof *list);
    fds[0] = (struct libusb_pollfd){c->poll, POLLIN};
    fds[1] = (struct libusb_pollfd){c->event, POLLIN};
    list[0] = &fds[0];
    list[1] = &fds[1];
    return list;
}

void libusb_free_pollfds(const struct libusb_pollfd **list)
{
    free((void *)list[0]);
    free((void *)list);
}

const char *libusb_error_name(int error)
{
    return error == LIBUSB_ERROR_BUSY ? "LIBUSB_ERROR_BUSY" : error == ERROR_PIPE ? "LIBUSB_ERROR_PIPE" : "LIBUSB_ERROR_OTHER";
}

/* ---- devices ---- */

static struct device *own(void *device)
{
    struct device *d = device;
    DEMAND(d->context->pid == getpid());
    return d;
}

int libusb_wrap_sys_device(void *context, intptr_t fd, void **device)
{
    struct context *c = context;
    DEMAND(c->pid == getpid());
    struct device *d = calloc(1, sizeof *d);
    *d = (struct device){.context = c, .file = (int)fd, .claimed = -1, .wire = -1};
    c->devices++;
    pthread_mutex_lock(&lock);
    d->next = all;
    all = d;
    pthread_mutex_unlock(&lock);
    *device = d;
    return 0;
}

static void disconnect(struct device *d)
{
    pthread_mutex_lock(&lock);
    if (d->wire >= 0) {
        shutdown(d->wire, SHUT_RDWR);
        close(d->wire);
    }
    d->wire = -1;
    pthread_mutex_unlock(&lock);
}

void libusb_close(void *device)
{
    struct device *d = own(device);
    DEMAND(!d->in && !d->out && d->wire < 0);
    pthread_mutex_lock(&lock);
    struct device **at = &all;
    while (*at != d)
        at = &(*at)->next;
    *at = d->next;
    pthread_mutex_unlock(&lock);
    d->context->devices--;
    free(d);
}

static int lock_interface(struct device *d, int interface, short type)
{
    struct flock one = {.l_type = type, .l_whence = SEEK_SET, .l_start = interface, .l_len = 1};
    return fcntl(d->file, F_OFD_SETLK, &one) ? LIBUSB_ERROR_BUSY : 0;
}

int libusb_claim_interface(void *device, int interface)
{
    struct device *d = own(device);
    int error = lock_interface(d, interface, F_WRLCK);
    if (!error)
        d->claimed = interface;
    return error;
}

int libusb_release_interface(void *device, int interface)
{
    struct device *d = own(device);
    DEMAND(d->claimed == interface);
    disconnect(d);
    d->claimed = -1;
    return lock_interface(d, interface, F_UNLCK);
}

int libusb_set_interface_alt_setting(void *device, int interface, int alternate)
{
    struct device *d = own(device);
    DEMAND(d->claimed == interface && alternate == 1 && d->wire < 0);
    struct sockaddr_un module = {.sun_family = AF_UNIX};
    if (pread(d->file, module.sun_path, sizeof module.sun_path - 1, 0) <= 0)
        return LIBUSB_ERROR_NO_DEVICE;
    pthread_mutex_lock(&lock);
    d->wire = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    pthread_mutex_unlock(&lock);
    if (connect(d->wire, (struct sockaddr *)&module, sizeof module)) {
        disconnect(d);
        return ERROR_PIPE;
    }
    struct epoll_event event = {.events = 0, .data.ptr = d};
    epoll_ctl(d->context->poll, EPOLL_CTL_ADD, d->wire, &event);
    return 0;
}

/* ---- transfers ---- */

static void watch(struct device *d)
{
    struct epoll_event event = {.events = (d->in ? EPOLLIN : 0u) | (d->out ? EPOLLOUT : 0u), .data.ptr = d};
    if (d->wire >= 0)
        epoll_ctl(d->context->poll, EPOLL_CTL_MOD, d->wire, &event);
}

static struct transfer *private(struct libusb_transfer *transfer)
{
    return (struct transfer *)((char *)transfer - offsetof(struct transfer, public));
}

struct libusb_transfer *libusb_alloc_transfer(int iso_packets)
{
    DEMAND(!iso_packets);
    struct transfer *t = calloc(1, sizeof *t);
    return &t->public;
}

void libusb_free_transfer(struct libusb_transfer *transfer)
{
    if (!transfer)
        return;
    DEMAND(!private(transfer)->device);
    free(private(transfer));
}

int libusb_submit_transfer(struct libusb_transfer *transfer)
{
    struct device *d = own(transfer->device);
    struct transfer **at = transfer->endpoint & 0x80 ? &d->in : &d->out, *t = private(transfer);
    DEMAND(!*at && !t->device && transfer->type == LIBUSB_TRANSFER_TYPE_BULK && transfer->length > 0);
    DEMAND(!(transfer->endpoint & 0x80) || transfer->length % 512 == 0);
    if (d->wire < 0)
        return ERROR_IO;
    t->device = d;
    t->cancelled = 0;
    *at = t;
    watch(d);
    return 0;
}

int libusb_cancel_transfer(struct libusb_transfer *transfer)
{
    struct transfer *t = private(transfer);
    if (!t->device)
        return LIBUSB_ERROR_NOT_FOUND;
    t->cancelled = !getenv("FAKE_USB_STUCK");
    uint64_t one = 1;
    DEMAND(write(own(t->device)->context->event, &one, sizeof one) == sizeof one);
    return 0;
}

/* The next step of one that is under way; -1: not yet. */
static int step(struct device *d, struct transfer *t)
{
    const char *piece = getenv("FAKE_USB_PIECE");
    size_t most = (size_t)t->public.length;
    if (piece && most > (size_t)atoi(piece))
        most = (size_t)atoi(piece);
    t->public.actual_length = 0;
    if (t->cancelled)
        return CANCELLED;
    ssize_t moved = t == d->in ? recv(d->wire, t->public.buffer, most, MSG_DONTWAIT)
                               : send(d->wire, t->public.buffer, most, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (moved < 0 && (errno == EAGAIN || errno == EINTR))
        return -1;
    struct stat file;
    if (moved <= 0)
        return fstat(d->file, &file) || !file.st_nlink ? NO_DEVICE : STALL;
    t->public.actual_length = (int)moved;
    return LIBUSB_TRANSFER_COMPLETED;
}

static void progress(struct device *d, struct transfer **at)
{
    struct transfer *t = *at;
    int status = t ? step(d, t) : -1;
    if (status < 0)
        return;
    *at = NULL;
    t->device = NULL;
    t->public.status = status;
    watch(d);
    t->public.callback(&t->public);
}

int libusb_handle_events_timeout_completed(void *context, struct timeval *time, int *completed)
{
    struct context *c = context;
    DEMAND(c->pid == getpid() && !time->tv_sec && !time->tv_usec && !completed);
    uint64_t count;
    (void)!read(c->event, &count, sizeof count);
    pthread_mutex_lock(&lock);
    struct device *d = all;
    while (d && d->context != c)
        d = d->next;
    pthread_mutex_unlock(&lock);
    if (d) {
        progress(d, &d->in);
        progress(d, &d->out);
    }
    char end;
    return d && getenv("FAKE_USB_GONE") && recv(d->wire, &end, 1, MSG_PEEK | MSG_DONTWAIT) == 0 ? ERROR_IO : 0;
}
