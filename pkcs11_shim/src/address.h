/* Where the module is: from the environment, a config file, or the default. */
#ifndef ADDRESS_H
#define ADDRESS_H

#include <stdbool.h>
#include <sys/socket.h>

#include "slots.h"
#include "usb_modules.h"

struct address {
    union {
        struct sockaddr any;
        struct sockaddr_storage storage;
    } to;
    socklen_t size;
    bool usb; /* instead: a module on the USB bus, the one with `serial`, or the only one */
    char serial[MOST_SERIAL + 1];
    unsigned reconnect_ms; /* how long a lost connection is sought */
    unsigned deadline_ms;  /* how long an answer may take */
    struct slots slots;    /* that applications see */
    char text[160];        /* as it was written, for diagnostics */
};

/* Reads HSMVISOR_PKCS11_ADDRESS and HSMVISOR_PKCS11_SLOTS, else HSMVISOR_PKCS11_CONFIG or /etc/hsmvisor/pkcs11.conf, else the defaults.
 * Returns false when it cannot be understood; `text` then says why. */
bool address_find(struct address *address);

#endif
