/* Which modules are on the USB bus, by what the kernel says of its devices in sysfs: nothing is opened, no device is asked. */
#ifndef USB_MODULES_H
#define USB_MODULES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MOST_CHANNELS 32u /* that are looked at; a module has 12 */
#define MOST_SERIAL 126u  /* characters of a USB string descriptor */

/* A vendor interface (class 0xFF, subclass 0x48 'H', protocol 1) whose alternate setting 1 has a bulk endpoint each way: one connection. */
struct usb_channel {
    uint8_t interface, in, out;
};

struct usb_module {
    char serial[MOST_SERIAL + 1];
    char node[256]; /* /dev/bus/usb/BBB/DDD */
    unsigned count;
    struct usb_channel channels[MOST_CHANNELS];
};

/* Reads descriptors as the file of that name in sysfs has them, whatever they are; false when it is no module. */
bool usb_channels(const uint8_t *data, size_t length, struct usb_module *module);

/* Finds the module with this serial number, "" = the only one there is; false with `why`. */
bool usb_find(const char *serial, struct usb_module *found, char *why, size_t room);

#endif
