/* hsmvisor-guest: keeps certificate files in step with the token, and reloads the program that reads them. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "token.h"

#define MAX_FILES 64
#define WAIT_MS 1000u        /* one wait; then the signals are looked at again */
#define MISSING_PAUSE_MS 500u /* while the module or a certificate is not there */

static const char help[] =
    "usage: hsmvisor-guest sync --label NAME --out FILE [--label NAME --out FILE]... [options]\n"
    "\n"
    "Writes the certificate with the label NAME from the token to FILE as PEM, again whenever it is replaced.\n"
    "The file is replaced whole (written beside it, synced, renamed) and keeps its mode and owner.\n"
    "\n"
    "  --chain            with the intermediate certificates behind it, as ssl_certificate of nginx wants them\n"
    "  --reload COMMAND   run by /bin/sh after files have changed, e.g. 'nginx -s reload'\n"
    "  --settle SECONDS   wait this long after a rotation before files are written (default 3): a program that searched the token less\n"
    "                     than 2 seconds ago still sees the key before, and would find that it does not fit the new certificate\n"
    "  --once             write the files and end: 0 when all were there\n"
    "  --interval SECONDS how often to look with a library that cannot tell of rotations (default 10)\n"
    "  --module FILE      PKCS#11 library (default: libhsmvisor-pkcs11.so beside this program, or in ../lib/pkcs11)\n"
    "\n"
    "The module's address comes from HSMVISOR_PKCS11_ADDRESS or /etc/hsmvisor/pkcs11.conf.\n"
    "Exit status: 0 done or ended by a signal, 1 something failed, 2 wrong usage.\n";

struct file {
    const char *label, *path;
};

static struct {
    struct file files[MAX_FILES];
    int count;
    bool chain, once;
    const char *reload, *module;
    unsigned interval, settle;
} options = {.interval = 10, .settle = 3};

static volatile sig_atomic_t ended;

static void end(int signal_number)
{
    (void)signal_number;
    ended = 1;
}

/* ---- files ---- */

static bool same(const char *path, const char *text, size_t length)
{
    char *have = malloc(length + 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 || !have ? -1 : read(fd, have, length + 1);
    bool equal = got == (ssize_t)length && !memcmp(have, text, length);
    if (fd >= 0)
        close(fd);
    free(have);
    return equal;
}

static bool sync_directory(const char *path)
{
    char copy[PATH_MAX];
    snprintf(copy, sizeof copy, "%s", path);
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool good = fd >= 0 && !fsync(fd);
    if (fd >= 0)
        close(fd);
    return good;
}

static bool write_file(const char *path, const char *text, size_t length)
{
    char temporary[PATH_MAX];
    struct stat old;
    bool existed = !stat(path, &old);
    if (snprintf(temporary, sizeof temporary, "%s.hsmvisor-new", path) >= (int)sizeof temporary) {
        errno = ENAMETOOLONG;
        return false;
    }
    unlink(temporary);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return false;
    bool good = true;
    for (size_t done = 0; good && done < length;) {
        ssize_t written = write(fd, text + done, length - done);
        if (written < 0 && errno == EINTR)
            continue;
        good = written > 0;
        done += good ? (size_t)written : 0;
    }
    good = good && !fchmod(fd, existed ? old.st_mode & 07777 : 0644);
    if (good && existed && (old.st_uid != geteuid() || old.st_gid != getegid()))
        good = !fchown(fd, old.st_uid, old.st_gid);
    good = good && !fsync(fd);
    int reason = errno;
    close(fd);
    if (good)
        good = !rename(temporary, path) && sync_directory(path);
    else {
        unlink(temporary);
        errno = reason;
    }
    return good;
}

/* ---- one round ---- */

enum round { ROUND_DONE, ROUND_CHANGED, ROUND_MISSING, ROUND_FAILED };

static enum round update_all(const struct token *token)
{
    static bool told[MAX_FILES];
    enum round result = ROUND_DONE;
    for (int i = 0; i < options.count; i++) {
        const struct file *file = &options.files[i];
        char *pem;
        size_t length;
        enum found found = token_certificates(token, file->label, options.chain, &pem, &length);
        if (found != FOUND) {
            if (!told[i])
                fprintf(stderr, "hsmvisor-guest: %s\n", found == FAILED ? "the module does not answer; waiting for it"
                                                                        : "no certificate with this label in the token; waiting for it");
            if (!told[i] && found != FAILED)
                fprintf(stderr, "  label: %s\n", file->label);
            told[i] = true;
            if (result != ROUND_FAILED)
                result = ROUND_MISSING;
            continue;
        }
        told[i] = false;
        if (!same(file->path, pem, length)) {
            if (!write_file(file->path, pem, length)) {
                fprintf(stderr, "hsmvisor-guest: %s cannot be written: %s\n", file->path, strerror(errno));
                result = ROUND_FAILED;
            } else if (result == ROUND_DONE) {
                result = ROUND_CHANGED;
            }
        }
        free(pem);
    }
    return result;
}

static void reload(void)
{
    if (!options.reload)
        return;
    int status = system(options.reload);
    if (status == -1 || !WIFEXITED(status) || WEXITSTATUS(status))
        fprintf(stderr, "hsmvisor-guest: the reload command failed (%d): %s\n", WIFEXITED(status) ? WEXITSTATUS(status) : status, options.reload);
}

static void pause_ms(unsigned ms)
{
    struct timespec time = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&time, NULL);
}

static int sync_files(const struct token *token)
{
    CK_ULONG seen = 0;
    bool known = token->wait && token->wait(0, WAIT_MS, &seen) == CKR_OK;
    while (!ended) {
        enum round round = update_all(token);
        if (round == ROUND_CHANGED)
            reload();
        if (options.once)
            return round == ROUND_DONE || round == ROUND_CHANGED ? 0 : 1;
        if (round == ROUND_FAILED || round == ROUND_MISSING || !token->wait || !known) {
            pause_ms(token->wait || round != ROUND_DONE ? MISSING_PAUSE_MS : options.interval * 1000);
            known = token->wait && token->wait(0, WAIT_MS, &seen) == CKR_OK;
            continue;
        }
        CK_RV rv = token->wait(seen, WAIT_MS, &seen);
        known = rv == CKR_OK || rv == CKR_FUNCTION_CANCELED;
        for (unsigned second = 0; rv == CKR_OK && second < options.settle && !ended; second++)
            pause_ms(1000);
    }
    return 0;
}

/* ---- options ---- */

static int usage(const char *why)
{
    fprintf(stderr, "hsmvisor-guest: %s (see hsmvisor-guest --help)\n", why);
    return 2;
}

static int parse(int argc, char **argv)
{
    enum { LABEL = 256, OUT, CHAIN, RELOAD, ONCE, INTERVAL, SETTLE, MODULE, HELP };
    static const struct option known[] = {
        {"label", required_argument, NULL, LABEL}, {"out", required_argument, NULL, OUT},       {"chain", no_argument, NULL, CHAIN},
        {"reload", required_argument, NULL, RELOAD}, {"once", no_argument, NULL, ONCE},         {"interval", required_argument, NULL, INTERVAL},
        {"settle", required_argument, NULL, SETTLE}, {"module", required_argument, NULL, MODULE}, {"help", no_argument, NULL, HELP},         {NULL, 0, NULL, 0},
    };
    const char *label = NULL;
    for (int option; (option = getopt_long(argc, argv, "h", known, NULL)) != -1;) {
        switch (option) {
        case LABEL:
            if (label)
                return usage("each --label is followed by its --out");
            label = optarg;
            break;
        case OUT:
            if (!label || options.count == MAX_FILES)
                return usage(label ? "too many files" : "each --out follows its --label");
            options.files[options.count++] = (struct file){label, optarg};
            label = NULL;
            break;
        case CHAIN:
            options.chain = true;
            break;
        case RELOAD:
            options.reload = optarg;
            break;
        case ONCE:
            options.once = true;
            break;
        case INTERVAL:
            options.interval = (unsigned)strtoul(optarg, NULL, 10);
            if (!options.interval || options.interval > 86400)
                return usage("--interval is 1 to 86400 seconds");
            break;
        case SETTLE:
            options.settle = (unsigned)strtoul(optarg, NULL, 10);
            if (options.settle > 86400)
                return usage("--settle is 0 to 86400 seconds");
            break;
        case MODULE:
            options.module = optarg;
            break;
        case HELP:
        case 'h':
            fputs(help, stdout);
            exit(0);
        default:
            return 2;
        }
    }
    if (optind + 1 != argc || strcmp(argv[optind], "sync"))
        return usage("the one command is sync");
    if (label || !options.count)
        return usage("--label NAME --out FILE is needed");
    return 0;
}

static const char *default_module(void)
{
    static char path[PATH_MAX];
    char self[PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length > 0) {
        self[length] = 0;
        const char *directory = dirname(self);
        static const char *const places[] = {"libhsmvisor-pkcs11.so", "../lib/pkcs11/libhsmvisor-pkcs11.so"};
        for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
            if (snprintf(path, sizeof path, "%s/%s", directory, places[i]) < (int)sizeof path && !access(path, R_OK))
                return path;
        }
    }
    return "libhsmvisor-pkcs11.so";
}

int main(int argc, char **argv)
{
    int wrong = parse(argc, argv);
    if (wrong)
        return wrong;
    struct sigaction action = {.sa_handler = end};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    struct token token;
    if (!token_open(&token, options.module ? options.module : default_module()))
        return 1;
    int status = sync_files(&token);
    token_close(&token);
    return status;
}
