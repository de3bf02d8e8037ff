#include "usb_modules.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef USB_DEVICES /* tests have a directory of their own instead */
#define USB_DEVICES "/sys/bus/usb/devices"
#define USB_NODES "/dev/bus/usb"
#endif

#define MOST_DESCRIPTORS 4096u /* bytes; a module has some 500 */

/* USB 2.0, table 9-5 and the descriptors behind it */
enum { CONFIGURATION = 2, INTERFACE = 4, ENDPOINT = 5 };
enum { INTERFACE_SIZE = 9, ENDPOINT_SIZE = 7 };
enum { BULK = 2, TRANSFER_TYPE = 3, IN = 0x80 };

static bool is_channel(const uint8_t *interface)
{
    return interface[3] == 1 && interface[5] == 0xff && interface[6] == 0x48 && interface[7] == 0x01;
}

bool usb_channels(const uint8_t *data, size_t length, struct usb_module *module)
{
    struct usb_channel *channel = NULL;
    unsigned configurations = 0;
    module->count = 0;
    for (size_t size; length >= 2; data += size, length -= size) {
        size = data[0];
        if (size < 2 || size > length)
            break;
        if (data[1] == CONFIGURATION && ++configurations > 1)
            break; /* a module has one */
        if (data[1] == INTERFACE) {
            channel = NULL;
            if (size < INTERFACE_SIZE || !is_channel(data) || module->count == MOST_CHANNELS)
                continue;
            channel = &module->channels[module->count];
            *channel = (struct usb_channel){.interface = data[2]};
        } else if (data[1] == ENDPOINT && size >= ENDPOINT_SIZE && channel && (data[3] & TRANSFER_TYPE) == BULK) {
            *(data[2] & IN ? &channel->in : &channel->out) = data[2];
            if (channel->in && channel->out) {
                module->count++;
                channel = NULL;
            }
        }
    }
    return module->count > 0;
}

/* Returns how many bytes were read, 0 when the file cannot be: the device may be gone meanwhile. */
static size_t read_attribute(const char *device, const char *name, void *into, size_t room)
{
    char path[384];
    if (snprintf(path, sizeof path, "%s/%s/%s", USB_DEVICES, device, name) >= (int)sizeof path)
        return 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    size_t length = 0;
    for (ssize_t got; length < room; length += (size_t)got) {
        got = read(fd, (uint8_t *)into + length, room - length);
        if (got < 0 && errno == EINTR)
            got = 0;
        else if (got <= 0)
            break;
    }
    close(fd);
    return length;
}

static bool read_text(const char *device, const char *name, char *into, size_t room)
{
    size_t length = read_attribute(device, name, into, room - 1);
    into[length] = 0;
    into[strcspn(into, "\n")] = 0;
    return *into != 0;
}

static bool read_number(const char *device, const char *name, unsigned *number)
{
    char text[16], *end;
    if (!read_text(device, name, text, sizeof text))
        return false;
    unsigned long value = strtoul(text, &end, 10);
    *number = (unsigned)value;
    return !*end && value <= 999;
}

static bool read_module(const char *device, struct usb_module *module)
{
    uint8_t descriptors[MOST_DESCRIPTORS];
    size_t length = read_attribute(device, "descriptors", descriptors, sizeof descriptors);
    unsigned bus, number;
    if (!usb_channels(descriptors, length, module) || !read_number(device, "busnum", &bus) || !read_number(device, "devnum", &number))
        return false;
    read_text(device, "serial", module->serial, sizeof module->serial);
    return snprintf(module->node, sizeof module->node, "%s/%03u/%03u", USB_NODES, bus, number) < (int)sizeof module->node;
}

/* Adds a serial number to a list for an error's text.  What a device says may be anything. */
static void append(char *list, size_t room, const char *serial)
{
    size_t length = strlen(list);
    snprintf(list + length, room - length, "%s%s", length ? ", " : "", *serial ? serial : "one without a serial number");
    for (char *at = list + length; *at; at++)
        if (*at < ' ' || *at > '~')
            *at = '?';
}

/* A card that is another device for other keys has NAME~DIGEST. */
static bool is_named(const char *serial, const char *name)
{
    size_t length = strlen(name);
    return !strncmp(serial, name, length) && (!serial[length] || serial[length] == '~');
}

bool usb_find(const char *serial, struct usb_module *found, char *why, size_t room)
{
    DIR *directory = opendir(USB_DEVICES);
    char others[160] = "";
    unsigned count = 0;
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        struct usb_module module;
        if (*entry->d_name == '.' || strchr(entry->d_name, ':') || !read_module(entry->d_name, &module))
            continue; /* N-N:N.N is an interface */
        if (*serial && !is_named(module.serial, serial)) {
            append(others, sizeof others, module.serial);
            continue;
        }
        *found = module;
        count++;
        if (!*serial)
            append(others, sizeof others, module.serial);
    }
    if (directory)
        closedir(directory);
    if (count == 1 || (count && *serial)) /* one that is attached twice is there twice */
        return true;
    if (count)
        snprintf(why, room, "several modules are on the USB bus, and usb:serial=NAME says which: %s", others);
    else if (*others)
        snprintf(why, room, "no module on the USB bus has this serial number; there is %s", others);
    else
        snprintf(why, room, "no module is on the USB bus");
    return false;
}
