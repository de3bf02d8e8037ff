/* A connection over USB: one channel of a module's device, and the thread that carries bytes between it and a socket.
 *
 * A process has a channel as long as it has claimed the interface.  When it gives it up, or dies, the kernel sets the interface's alternate
 * setting 0, and by that the module ends the connection. */
#ifndef USB_H
#define USB_H

#include <stdbool.h>
#include <stddef.h>

struct usb;

/* Opens a channel of the module with this serial number ("" = of the only one); `*fd` is then the socket that leads to it, made under
 * descriptors_lock.  False with `why`, also between descriptors_stop and descriptors_start. */
bool usb_open(const char *serial, struct usb **usb, int *fd, char *why, size_t room);

/* Whether it was opened by this process, not by one that forked it.  With descriptors_lock held. */
bool usb_ours(const struct usb *usb);

/* Returns when the channel is given up and its thread has ended.  Its socket must have been shut down.  In a child nothing happens to a
 * parent's. */
void usb_close(struct usb *usb);

/* In a child: closes what it has inherited of its parent's channels, so that only the parent's end counts. */
void usb_child(void);

/* When this library is unloaded. */
void usb_unload(void);

#endif
