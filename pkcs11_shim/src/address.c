#include "address.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/un.h>

#define CONFIG_FILE "/etc/hsmvisor/pkcs11.conf"
#define DEFAULT_ADDRESS "unix:path=/run/hsmvisor/guest.sock"
#define DEFAULT_RECONNECT_MS 5000u
#define DEFAULT_DEADLINE_MS 30000u
#define MAX_LINE 512

static bool wrong(struct address *address, const char *why, const char *value)
{
    snprintf(address->text, sizeof address->text, "%s: %.80s", why, value);
    return false;
}

static bool number(const char *text, unsigned long most, unsigned long *value)
{
    char *end;
    errno = 0;
    *value = strtoul(text, &end, 0);
    return *text >= '0' && *text <= '9' && !*end && !errno && *value <= most;
}

static bool parse_unix(struct address *address, const char *keys)
{
    struct sockaddr_un *un = (struct sockaddr_un *)&address->to.storage;
    if (strncmp(keys, "path=/", 6) != 0)
        return wrong(address, "an address unix: has path=/absolute/path", keys);
    const char *path = keys + 5;
    if (strlen(path) >= sizeof un->sun_path)
        return wrong(address, "the path of a unix socket has at most 107 bytes", path);
    un->sun_family = AF_UNIX;
    strcpy(un->sun_path, path);
    address->size = sizeof *un;
    return true;
}

static bool parse_vsock(struct address *address, char *keys)
{
    struct sockaddr_vm *vm = (struct sockaddr_vm *)&address->to.storage;
    unsigned long cid = VMADDR_CID_HOST, port = 0;
    bool have_port = false;
    char *rest = NULL;
    for (char *key = strtok_r(keys, ";", &rest); key; key = strtok_r(NULL, ";", &rest)) {
        bool good = false;
        if (!strncmp(key, "cid=", 4))
            good = number(key + 4, 0xfffffffeUL, &cid);
        else if (!strncmp(key, "port=", 5))
            good = have_port = number(key + 5, 0xfffffffeUL, &port);
        if (!good)
            return wrong(address, "an address vsock: has cid=N;port=N", key);
    }
    if (!have_port)
        return wrong(address, "an address vsock: needs port=N", "");
    vm->svm_family = AF_VSOCK;
    vm->svm_cid = (unsigned)cid;
    vm->svm_port = (unsigned)port;
    address->size = sizeof *vm;
    return true;
}

static bool parse_usb(struct address *address, const char *keys)
{
    address->usb = true;
    if (!*keys)
        return true;
    if (strncmp(keys, "serial=", 7) != 0)
        return wrong(address, "an address usb: has serial=NAME, or nothing behind it for the only module", keys);
    const char *serial = keys + 7;
    size_t length = strlen(serial);
    for (const char *at = serial; *at; at++)
        if (*at < ' ' || *at > '~')
            length = 0;
    if (!length || length > MOST_SERIAL)
        return wrong(address, "the serial number of a module is 1 to 126 printable characters", serial);
    strcpy(address->serial, serial);
    return true;
}

static bool parse(struct address *address, const char *text)
{
    char copy[MAX_LINE];
    if (strlen(text) >= sizeof copy)
        return wrong(address, "an address is too long", text);
    strcpy(copy, text);
    memset(&address->to, 0, sizeof address->to);
    memset(address->serial, 0, sizeof address->serial);
    address->usb = false;
    bool good;
    if (!strncmp(copy, "unix:", 5))
        good = parse_unix(address, copy + 5);
    else if (!strncmp(copy, "vsock:", 6))
        good = parse_vsock(address, copy + 6);
    else if (!strncmp(copy, "usb:", 4))
        good = parse_usb(address, copy + 4);
    else
        return wrong(address, "an address begins with unix:, vsock: or usb:", text);
    if (good)
        snprintf(address->text, sizeof address->text, "%.150s", text);
    return good;
}

/* Lines `key = value`; # begins a comment. */
static bool read_config(struct address *address, FILE *file, bool *have_address)
{
    char line[MAX_LINE];
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "#\r\n")] = 0;
        char *equals = strchr(line, '=');
        char *key = line + strspn(line, " \t");
        if (!*key)
            continue;
        if (!equals)
            return wrong(address, "the configuration has lines key = value", key);
        char *value = equals + 1 + strspn(equals + 1, " \t");
        for (char *end = value + strlen(value); end > value && (end[-1] == ' ' || end[-1] == '\t');)
            *--end = 0;
        size_t length = strcspn(key, " \t=");
        unsigned long ms = 0;
        if (length == 7 && !strncmp(key, "address", 7)) {
            if (!parse(address, value))
                return false;
            *have_address = true;
        } else if (length == 12 && !strncmp(key, "reconnect_ms", 12) && number(value, 600000, &ms)) {
            address->reconnect_ms = (unsigned)ms;
        } else if (length == 11 && !strncmp(key, "deadline_ms", 11) && number(value, 600000, &ms) && ms) {
            address->deadline_ms = (unsigned)ms;
        } else if (length == 5 && !strncmp(key, "slots", 5) && slots_parse(&address->slots, value)) {
            continue;
        } else {
            return wrong(address, "the configuration knows address, slots, reconnect_ms, deadline_ms; wrong is", key);
        }
    }
    return true;
}

bool address_find(struct address *address)
{
    memset(address, 0, sizeof *address);
    address->reconnect_ms = DEFAULT_RECONNECT_MS;
    address->deadline_ms = DEFAULT_DEADLINE_MS;
    bool have_address = false;
    const char *named = secure_getenv("HSMVISOR_PKCS11_CONFIG");
    FILE *file = fopen(named ? named : CONFIG_FILE, "re");
    if (file) {
        bool good = read_config(address, file, &have_address);
        fclose(file);
        if (!good)
            return false;
    } else if (named) {
        return wrong(address, "the configuration cannot be read", named);
    }
    const char *slots = secure_getenv("HSMVISOR_PKCS11_SLOTS");
    if (slots && *slots && !slots_parse(&address->slots, slots))
        return wrong(address, "HSMVISOR_PKCS11_SLOTS is \"all\" or slots with commas between them", slots);
    const char *text = secure_getenv("HSMVISOR_PKCS11_ADDRESS");
    if (text && *text)
        return parse(address, text);
    return have_address || parse(address, DEFAULT_ADDRESS);
}
