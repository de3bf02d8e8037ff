/* hsmvisor-guest: keeps certificate files in step with the token, and reloads the program that reads them. */
#include <errno.h>
#include <getopt.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "file.h"
#include "token.h"

#define MAX_FILES 64
#define WAIT_MS 1000u    /* one pause; then the signals are looked at again */
#define PAUSE_MS 500u    /* while something is not there, or settles */
#define LOOK_AGAIN 60u   /* seconds after which the token is read even if no rotation was told */
#define MAX_SECONDS 86400ul

static const char help[] =
    "usage: hsmvisor-guest sync --label NAME --out FILE [--label NAME --out FILE]... [options]\n"
    "\n"
    "Writes the certificate with the label NAME from the token to FILE as PEM, again whenever it is replaced.\n"
    "The file is replaced whole (written beside it, synced, renamed) and keeps its mode and owner.\n"
    "\n"
    "  --chain            with the intermediate certificates behind it, as ssl_certificate of nginx wants them\n"
    "  --reload COMMAND   run by /bin/sh after files have changed, e.g. 'nginx -s reload'\n"
    "  --settle SECONDS   replace a file so long after a rotation (default 3): a program that searched the token less than\n"
    "                     2 seconds before still sees the key before, which does not fit the new certificate\n"
    "  --once             write the files now and end\n"
    "  --interval SECONDS how often to look with a library that cannot tell of rotations (default 10)\n"
    "  --module FILE      PKCS#11 library (default: libhsmvisor-pkcs11.so beside this program, or in ../lib/pkcs11)\n"
    "\n"
    "The module's address comes from HSMVISOR_PKCS11_ADDRESS or /etc/hsmvisor/pkcs11.conf.  A missing module, certificate or directory\n"
    "is told once and waited for; with --once it is a failure.\n"
    "Exit status: 0 done, or ended by SIGTERM or SIGINT; 1 something failed; 2 wrong usage.\n"
    "\n"
    "Example: hsmvisor-guest sync --label web --out /etc/nginx/web.pem --chain --reload 'nginx -s reload'\n";

struct file {
    const char *label, *path;
    int64_t due; /* when it may be replaced, since the token was seen to hold another certificate; 0 = it is in step */
    bool told;   /* what is wrong with it */
};

static struct {
    struct file files[MAX_FILES];
    int count;
    bool chain, once;
    const char *reload, *module;
    unsigned interval, settle;
} options = {.interval = 10, .settle = 3};

static volatile sig_atomic_t ended, waiting;

/* While it waits for the module nothing is half done: it ends at once.  (Each wait is a connection of its own to the module, and lines
 * in the host's audit log: many short ones would fill it.) */
static void end(int signal_number)
{
    (void)signal_number;
    ended = 1;
    if (waiting)
        _exit(0);
}

static int64_t now_ms(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000 + time.tv_nsec / 1000000;
}

static void pause_ms(unsigned ms)
{
    struct timespec time = {ms / 1000, (long)(ms % 1000) * 1000000};
    if (!ended)
        nanosleep(&time, NULL);
}

/* ---- one round ---- */

enum round { IN_STEP = 0, CHANGED = 1, UNSETTLED = 2, INCOMPLETE = 4 }; /* bits */

static unsigned tell(struct file *file, const char *what, const char *which)
{
    if (!file->told)
        fprintf(stderr, "hsmvisor-guest: %s: %s%s%s\n", file->path, what, which, options.once ? "" : "; trying on");
    file->told = true;
    return INCOMPLETE;
}

/* A file that exists is replaced --settle seconds after the token was seen to hold another certificate, by what it holds then: a reload
 * is thus never followed so soon by another that the program's search for the key is answered from the view before. */
static unsigned update(const struct token *token, struct file *file)
{
    char *text;
    size_t length;
    switch (token_certificates(token, file->label, options.chain, &text, &length)) {
    case NO_TOKEN:
        return tell(file, "the module does not answer (HSMVISOR_PKCS11_DEBUG=1 tells more)", "");
    case NOT_THERE:
        return tell(file, "the token has no certificate with the label ", file->label);
    case FAILED:
        return tell(file, "the token could not be read (HSMVISOR_PKCS11_DEBUG=1 tells more)", "");
    case FOUND:
        break;
    }
    unsigned result = IN_STEP;
    if (!file_holds(file->path, text, length)) {
        if (!file->due)
            file->due = now_ms() + (options.once || !file_exists(file->path) ? 0 : options.settle * INT64_C(1000));
        if (now_ms() < file->due)
            result = UNSETTLED;
        else if (file_replace(file->path, text, length))
            result = CHANGED;
        else
            result = tell(file, "cannot be written: ", strerror(errno));
    }
    free(text);
    if (result == CHANGED) {
        printf("%s: written\n", file->path);
        fflush(stdout);
    }
    if (result == IN_STEP || result == CHANGED) {
        file->due = 0;
        file->told = false;
    }
    return result;
}

static unsigned update_all(const struct token *token)
{
    unsigned result = IN_STEP;
    for (int i = 0; i < options.count; i++)
        result |= update(token, &options.files[i]);
    return result;
}

static void reload(void)
{
    if (!options.reload)
        return;
    int status = system(options.reload);
    if (status == -1)
        fprintf(stderr, "hsmvisor-guest: the reload command could not be run: %s\n", strerror(errno));
    else if (WIFSIGNALED(status))
        fprintf(stderr, "hsmvisor-guest: the reload command was ended by signal %d: %s\n", WTERMSIG(status), options.reload);
    else if (WEXITSTATUS(status))
        fprintf(stderr, "hsmvisor-guest: the reload command ended with %d: %s\n", WEXITSTATUS(status), options.reload);
}

/* Returns when there may be something new.  `seen` is the newest rotation that was told. */
static void wait_for_change(const struct token *token, CK_ULONG *seen)
{
    int64_t until = now_ms() + (token->wait ? LOOK_AGAIN : options.interval) * INT64_C(1000);
    while (!ended && now_ms() < until) {
        CK_RV rv = CKR_FUNCTION_CANCELED;
        if (token->wait) {
            waiting = 1;
            if (!ended)
                rv = token->wait(*seen, LOOK_AGAIN * 1000u, seen);
            waiting = 0;
        } else {
            pause_ms(WAIT_MS);
        }
        if (rv == CKR_OK)
            return;
        if (rv != CKR_FUNCTION_CANCELED) {
            pause_ms(PAUSE_MS); /* the module is away */
            return;
        }
    }
}

static int sync_files(const struct token *token)
{
    CK_ULONG seen = 0;
    while (!ended) {
        unsigned result = update_all(token);
        if (result & CHANGED)
            reload();
        if (options.once)
            return result & INCOMPLETE ? 1 : 0;
        if (result & (UNSETTLED | INCOMPLETE))
            pause_ms(PAUSE_MS);
        else
            wait_for_change(token, &seen);
    }
    return 0;
}

/* ---- options ---- */

static int usage(const char *why)
{
    fprintf(stderr, "hsmvisor-guest: %s (see hsmvisor-guest --help)\n", why);
    return 2;
}

static bool parse_seconds(const char *text, unsigned long least, unsigned *value)
{
    char *rest;
    unsigned long number = strtoul(text, &rest, 10);
    *value = (unsigned)number;
    return *text >= '0' && *text <= '9' && !*rest && number >= least && number <= MAX_SECONDS;
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
            options.files[options.count++] = (struct file){.label = label, .path = optarg};
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
            if (!parse_seconds(optarg, 1, &options.interval))
                return usage("--interval is 1 to 86400 seconds");
            break;
        case SETTLE:
            if (!parse_seconds(optarg, 0, &options.settle))
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
