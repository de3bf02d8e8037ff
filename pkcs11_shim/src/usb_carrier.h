/* What carries the bytes of one channel: its libusb, its transfers, its socket, its thread.  usb.c makes and ends it. */
#ifndef USB_CARRIER_H
#define USB_CARRIER_H

#include <poll.h>
#include <pthread.h>

#include "usb.h"
#include "usb_library.h"
#include "usb_modules.h"

#define PIECE 65536u /* bytes of a transfer at most, whole packets */
#define MOST_WATCHED 8u

/* One direction. */
struct half {
    struct libusb_transfer *transfer;
    bool under_way;
    uint8_t data[PIECE];
    size_t start, end; /* what is in `data` and has to go on: to the socket, to the module */
};

struct usb {
    struct usb *next; /* of this process's */
    const struct usb_library *libusb;
    int node, socket; /* the device; the thread's end */
    struct pollfd watched[MOST_WATCHED]; /* libusb's; `node` is one of them */
    nfds_t watching;
    void *context, *device;
    struct usb_channel channel;
    bool claimed;
    bool lost; /* the module is gone, or the channel */
    struct half in, out;
    pthread_t thread;
};

/* Starts the thread.  It ends when the other end of the socket is shut down or the module is gone, and gives the channel up.  Returns an
 * errno. */
int usb_carry(struct usb *usb);

/* Gives up all that there is of it, but not its memory: `watching` is 0 when nobody else uses that.  For one that has no thread. */
void usb_give_up(struct usb *usb);

#endif
