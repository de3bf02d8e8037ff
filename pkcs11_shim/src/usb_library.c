#include "usb_library.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#define FILE_NAME "libusb-1.0.so.0"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct usb_library functions;
static void *library;
static bool discovers;

/* Those without which it is too old. */
static const struct {
    const char *name;
    void *at;
} needed[] = {
    {"libusb_init", &functions.init},
    {"libusb_set_option", &functions.set_option},
    {"libusb_exit", &functions.exit},
    {"libusb_wrap_sys_device", &functions.wrap_sys_device},
    {"libusb_close", &functions.close},
    {"libusb_claim_interface", &functions.claim_interface},
    {"libusb_release_interface", &functions.release_interface},
    {"libusb_set_interface_alt_setting", &functions.set_interface_alt_setting},
    {"libusb_alloc_transfer", &functions.alloc_transfer},
    {"libusb_free_transfer", &functions.free_transfer},
    {"libusb_submit_transfer", &functions.submit_transfer},
    {"libusb_cancel_transfer", &functions.cancel_transfer},
    {"libusb_handle_events_timeout_completed", &functions.handle_events_timeout_completed},
    {"libusb_get_pollfds", &functions.get_pollfds},
    {"libusb_free_pollfds", &functions.free_pollfds},
    {"libusb_error_name", &functions.error_name},
};

static bool look_up(const char *name, void *at)
{
    *(void **)at = dlsym(library, name);
    return *(void **)at != NULL;
}

/* A context must find no devices by itself: for that libusb starts a thread that listens to udev, and reads all of sysfs.  Before 1.0.27
 * this can only be told for all contexts of the process.  So where the program had libusb before us, and may look for devices of its
 * own, libusb does as it likes. */
static void choose_discovery(bool of_program)
{
    discovers = false;
    if (functions.init_context)
        return;
    discovers = of_program;
    if (!of_program)
        functions.set_option(NULL, LIBUSB_OPTION_NO_DEVICE_DISCOVERY);
}

const struct usb_library *usb_library(char *why, size_t room)
{
    if (library)
        return &functions;
    void *before = dlopen(FILE_NAME, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    library = before ? before : dlopen(FILE_NAME, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why, room, "libusb is needed, install libusb-1.0-0 (%s)", dlerror());
        return NULL;
    }
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        if (!look_up(needed[i].name, needed[i].at)) {
            snprintf(why, room, FILE_NAME " has no %s: libusb 1.0.23 or newer is needed", needed[i].name);
            dlclose(library);
            library = NULL;
            return NULL;
        }
    }
    look_up("libusb_init_context", &functions.init_context);
    choose_discovery(before != NULL);
    return &functions;
}

int usb_library_begin(void **context)
{
    static const struct libusb_init_option quiet = {.option = LIBUSB_OPTION_NO_DEVICE_DISCOVERY};
    return functions.init_context ? functions.init_context(context, &quiet, 1) : functions.init(context);
}

bool usb_library_discovers(void)
{
    return discovers;
}

void usb_library_lock(void)
{
    pthread_mutex_lock(&lock);
}

void usb_library_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void usb_library_child(void)
{
    pthread_mutex_init(&lock, NULL);
}

void usb_library_unload(void)
{
    pthread_mutex_lock(&lock);
    if (library)
        dlclose(library);
    library = NULL;
    pthread_mutex_unlock(&lock);
}
