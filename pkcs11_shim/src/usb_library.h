/* libusb-1.0, loaded when it is needed: what this library declares of it, so that it can be built and loaded without. */
#ifndef USB_LIBRARY_H
#define USB_LIBRARY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/time.h>

/* ---- its ABI (libusb.h of 1.0.23 and later; the same in all 1.0) ---- */

enum {
    LIBUSB_ERROR_NO_DEVICE = -4,
    LIBUSB_ERROR_NOT_FOUND = -5,
    LIBUSB_ERROR_BUSY = -6,
    LIBUSB_ERROR_INTERRUPTED = -10,
    LIBUSB_OPTION_NO_DEVICE_DISCOVERY = 2,
    LIBUSB_TRANSFER_TYPE_BULK = 2,
    LIBUSB_TRANSFER_COMPLETED = 0,
};

struct libusb_init_option {
    int option; /* enum libusb_option */
    union {
        int number;
        void (*function)(void);
    } value;
};

struct libusb_pollfd {
    int fd;
    short events;
};

struct libusb_transfer {
    void *device;
    uint8_t flags;
    unsigned char endpoint, type;
    unsigned timeout; /* milliseconds, 0 = none */
    int status;       /* enum libusb_transfer_status */
    int length, actual_length;
    void (*callback)(struct libusb_transfer *);
    void *user_data;
    unsigned char *buffer;
    int num_iso_packets; /* what follows is for those alone */
};

struct usb_library {
    int (*init)(void **context);
    int (*init_context)(void **context, const struct libusb_init_option *options, int count); /* NULL before 1.0.27 */
    int (*set_option)(void *context, int option, ...);
    void (*exit)(void *context);
    int (*wrap_sys_device)(void *context, intptr_t fd, void **device);
    void (*close)(void *device);
    int (*claim_interface)(void *device, int interface);
    int (*release_interface)(void *device, int interface);
    int (*set_interface_alt_setting)(void *device, int interface, int alternate);
    struct libusb_transfer *(*alloc_transfer)(int iso_packets);
    void (*free_transfer)(struct libusb_transfer *transfer);
    int (*submit_transfer)(struct libusb_transfer *transfer);
    int (*cancel_transfer)(struct libusb_transfer *transfer);
    int (*handle_events_timeout_completed)(void *context, struct timeval *time, int *completed);
    const struct libusb_pollfd **(*get_pollfds)(void *context);
    void (*free_pollfds)(const struct libusb_pollfd **list);
    const char *(*error_name)(int error);
};

/* ---- its life ---- */

/* NULL with `why` when there is none, or one that is too old.  With the lock held, as the next. */
const struct usb_library *usb_library(char *why, size_t room);

/* Begins a context that looks for no devices by itself.  Returns what libusb says. */
int usb_library_begin(void **context);

/* Whether libusb may write to a context's descriptors in a child that inherited it: it was told to look for devices after all. */
bool usb_library_discovers(void);

/* Calls that touch what all contexts share (init, exit, wrap, close, events) are made under this lock.  It is held over a fork, so that a
 * child finds libusb's own locks free; and taken before descriptors_lock. */
void usb_library_lock(void);
void usb_library_unlock(void);
void usb_library_child(void);

/* When this library is unloaded. */
void usb_library_unload(void);

#endif
