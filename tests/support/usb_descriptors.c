/* What libhsmvisor-pkcs11.so reads in a device's descriptors, for sanitizers: inputs of u16 length (little-endian) and so many bytes come
 * from standard input, each is copied to memory of exactly its size, and a line tells its channels as INTERFACE:IN:OUT. */
#include <stdio.h>
#include <stdlib.h>

#include "usb_modules.h"

int main(void)
{
    uint8_t size[2];
    while (fread(size, 1, 2, stdin) == 2) {
        size_t length = size[0] | (size_t)size[1] << 8;
        uint8_t *data = malloc(length);
        struct usb_module module;
        if (fread(data, 1, length, stdin) != length)
            return 1;
        if (usb_channels(data, length, &module) != (module.count > 0))
            return 2;
        for (unsigned i = 0; i < module.count; i++)
            printf(" %u:%u:%u", module.channels[i].interface, module.channels[i].in, module.channels[i].out);
        printf("\n");
        free(data);
    }
    return 0;
}
