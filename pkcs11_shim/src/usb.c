#include "usb.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "descriptors.h"
#include "usb_carrier.h"

static struct usb *all; /* of this process; under descriptors_lock */

/* ---- opening ---- */

static bool failed(const struct usb *usb, char *why, size_t room, const char *what, int error)
{
    snprintf(why, room, "%s: %s", what, usb->libusb->error_name(error));
    return false;
}

static bool open_node(struct usb *usb, const struct usb_module *module, char *why, size_t room)
{
    descriptors_lock();
    usb->next = all; /* a child closes what it finds here */
    all = usb;
    usb->node = above_standard(open(module->node, O_RDWR | O_CLOEXEC));
    int reason = errno;
    descriptors_unlock();
    if (usb->node < 0)
        snprintf(why, room, "%s: %s%s", module->node, strerror(reason), reason == EACCES ? " (a udev rule would give access)" : "");
    return usb->node >= 0;
}

/* With the lock of usb_library.h: a fork finds libusb's descriptors noted, or not there yet. */
static bool begin(struct usb *usb, char *why, size_t room)
{
    int error = usb_library_begin(&usb->context);
    if (error) {
        usb->context = NULL;
        return failed(usb, why, room, "libusb cannot begin", error);
    }
    error = usb->libusb->wrap_sys_device(usb->context, usb->node, &usb->device);
    if (error) {
        usb->device = NULL;
        return failed(usb, why, room, "libusb cannot use the device", error);
    }
    const struct libusb_pollfd **list = usb->libusb->get_pollfds(usb->context);
    bool good = list != NULL;
    for (; good && list[usb->watching]; usb->watching++) {
        good = usb->watching < MOST_WATCHED;
        if (good)
            usb->watched[usb->watching] = (struct pollfd){.fd = list[usb->watching]->fd, .events = list[usb->watching]->events};
    }
    usb->libusb->free_pollfds(list);
    if (!good)
        snprintf(why, room, "libusb has too many descriptors");
    return good;
}

static bool begin_locked(struct usb *usb, char *why, size_t room)
{
    usb_library_lock();
    bool good = begin(usb, why, room);
    usb_library_unlock();
    return good;
}

/* Each process begins to look elsewhere, so that those that start together seldom want the same one. */
static bool claim(struct usb *usb, const struct usb_module *module, char *why, size_t room)
{
    unsigned first = (unsigned)getpid();
    for (unsigned i = 0; i < module->count; i++) {
        usb->channel = module->channels[(first + i) % module->count];
        int error = usb->libusb->claim_interface(usb->device, usb->channel.interface);
        usb->claimed = !error;
        if (error == LIBUSB_ERROR_BUSY)
            continue;
        if (!error)
            error = usb->libusb->set_interface_alt_setting(usb->device, usb->channel.interface, 1);
        return !error || failed(usb, why, room, "the module opens no channel", error);
    }
    snprintf(why, room, "all %u channels of the module are taken by connections of this system", module->count);
    return false;
}

static bool join_socket(struct usb *usb, int *fd, char *why, size_t room)
{
    int pair[2];
    descriptors_lock();
    bool good = !descriptors_stopped() && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair);
    int reason = descriptors_stopped() ? ECANCELED : errno;
    if (good) {
        *fd = above_standard(pair[0]);
        usb->socket = above_standard(pair[1]);
    }
    descriptors_unlock();
    if (!good)
        snprintf(why, room, "no socket: %s", strerror(reason));
    return good;
}

static bool open_channel(struct usb *usb, const struct usb_module *module, int *fd, char *why, size_t room)
{
    if (!open_node(usb, module, why, room) || !begin_locked(usb, why, room) || !claim(usb, module, why, room))
        return false;
    usb->in.transfer = usb->libusb->alloc_transfer(0);
    usb->out.transfer = usb->libusb->alloc_transfer(0);
    if (!usb->in.transfer || !usb->out.transfer) {
        snprintf(why, room, "no memory");
        return false;
    }
    if (!join_socket(usb, fd, why, room))
        return false;
    int error = usb_carry(usb);
    if (error)
        snprintf(why, room, "no thread: %s", strerror(error));
    return !error;
}

/* Frees its memory, unless libusb has not given it back. */
static void forget(struct usb *usb)
{
    descriptors_lock();
    struct usb **at = &all;
    while (*at && *at != usb)
        at = &(*at)->next;
    if (*at)
        *at = usb->next;
    descriptors_unlock();
    if (!usb->watching) {
        explicit_bzero(usb, sizeof *usb); /* what was on its way may have been secret */
        free(usb);
    }
}

static const struct usb_library *load(char *why, size_t room)
{
    usb_library_lock();
    const struct usb_library *libusb = usb_library(why, room);
    usb_library_unlock();
    return libusb;
}

bool usb_open(const char *serial, struct usb **usb, int *fd, char *why, size_t room)
{
    struct usb_module module;
    const struct usb_library *libusb = load(why, room);
    *usb = NULL;
    if (!libusb || !usb_find(serial, &module, why, room))
        return false;
    struct usb *opened = calloc(1, sizeof *opened);
    if (!opened) {
        snprintf(why, room, "no memory");
        return false;
    }
    opened->libusb = libusb;
    opened->node = opened->socket = -1;
    if (open_channel(opened, &module, fd, why, room)) {
        *usb = opened;
        return true;
    }
    descriptors_lock();
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    descriptors_unlock();
    usb_give_up(opened);
    forget(opened);
    return false;
}

/* ---- closing, fork ---- */

bool usb_ours(const struct usb *usb)
{
    const struct usb *at = all;
    while (at && at != usb)
        at = at->next;
    return at != NULL;
}

void usb_close(struct usb *usb)
{
    descriptors_lock();
    bool ours = usb_ours(usb);
    descriptors_unlock();
    if (!ours)
        return;
    pthread_join(usb->thread, NULL);
    forget(usb);
}

void usb_child(void)
{
    for (; all; all = all->next) {
        if (all->node >= 0)
            close(all->node);
        if (all->socket >= 0)
            close(all->socket);
        for (nfds_t i = 0; i < all->watching && !usb_library_discovers(); i++)
            if (all->watched[i].fd != all->node)
                close(all->watched[i].fd);
    }
}

void usb_unload(void)
{
    descriptors_lock();
    bool unused = !all;
    descriptors_unlock();
    if (unused)
        usb_library_unload();
}
