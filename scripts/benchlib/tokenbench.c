/*
 * tokenbench - times single calls of any PKCS#11 module, one after the other, in one thread.
 *
 * Prints one line of JSON for each measure that is named (tokencalls.c); diagnostics go to stderr.  What is timed is the call (or Init,
 * call and Final) alone: what makes and removes its objects is not.  A measure whose mechanism the module or its client lacks says so.
 * The measure `fill` makes the objects that are searched.
 * Exit status: 0 all were measured or lacking, 2 anything else.
 *
 * Build: cc -O2 -Wall -Wextra -o tokenbench tokenbench.c tokencalls.c $(pkg-config --cflags p11-kit-1) -ldl
 */
#define _GNU_SOURCE
#include "tokenbench.h"

#include <dlfcn.h>
#include <getopt.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define MOST_SAMPLES 1000000u

CK_FUNCTION_LIST *p11;
CK_SLOT_ID slot;
CK_SESSION_HANDLE session;
CK_ULONG objects;

static struct {
    const char *module, *pin, *token, *measures;
    CK_ULONG first; /* number of the first object that `fill` makes */
    size_t most;
    double seconds;
} opt = {.seconds = 1, .most = MOST_SAMPLES};

void check(CK_RV rv, const char *what)
{
    if (rv != CKR_OK)
        DIE("%s: CK_RV 0x%lx", what, (unsigned long)rv);
}

/* ---- measuring */

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static bool lacking(CK_RV rv)
{
    return rv == CKR_MECHANISM_INVALID || rv == CKR_FUNCTION_NOT_SUPPORTED || rv == CKR_MECHANISM_PARAM_INVALID;
}

static void failed(const struct measure *m, CK_RV rv)
{
    if (!lacking(rv))
        DIE("%s: CK_RV 0x%lx", m->name, (unsigned long)rv);
    printf("{\"measure\":\"%s\",\"lacks\":\"0x%lx\"}\n", m->name, (unsigned long)rv);
}

static void report(const struct measure *m, uint64_t *took, size_t n)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += took[i];
    qsort(took, n, sizeof *took, ascending);
    printf("{\"measure\":\"%s\",\"calls\":%zu,\"mean_us\":%.3f,\"min_us\":%.3f,\"p50_us\":%.3f,\"p99_us\":%.3f}\n", m->name, n,
           (double)sum / (double)n / 1e3, (double)took[0] / 1e3, (double)took[n / 2] / 1e3, (double)took[n * 99 / 100] / 1e3);
    fflush(stdout);
}

/* The first call warms up, and shows whether there is such a thing. */
static void run(const struct measure *m)
{
    static uint64_t took[MOST_SAMPLES];
    size_t n = 0;
    CK_RV rv = m->prepare ? m->prepare(m) : CKR_OK;
    if (rv == CKR_OK)
        rv = m->once(m);
    if (rv != CKR_OK) {
        failed(m, rv);
        return;
    }
    if (m->after)
        m->after(m);
    uint64_t end = now_ns() + (uint64_t)(opt.seconds * 1e9), before, after;
    do {
        before = now_ns();
        rv = m->once(m);
        after = now_ns();
        check(rv, m->name);
        took[n++] = after - before;
        if (m->after)
            m->after(m);
    } while (n < opt.most && n < MOST_SAMPLES && now_ns() < end);
    if (m->end)
        m->end(m);
    report(m, took, n);
}

static void run_named(const char *name)
{
    if (strcmp(name, "fill")) {
        run(measure_named(name));
        return;
    }
    for (CK_ULONG i = opt.first; i < opt.first + objects; i++)
        check(create(i), "C_CreateObject");
    printf("{\"measure\":\"fill\",\"objects\":%lu}\n", objects);
}

/* ---- set-up */

static void parse_options(int argc, char **argv)
{
    static const struct option longs[] = {
        {"module", 1, 0, 'm'}, {"pin", 1, 0, 'p'}, {"token", 1, 0, 't'}, {"measures", 1, 0, 'M'}, {"seconds", 1, 0, 's'},
        {"count", 1, 0, 'c'}, {"first", 1, 0, 'f'}, {"most", 1, 0, 'n'}, {0}};
    int c;
    while ((c = getopt_long(argc, argv, "", longs, NULL)) != -1) {
        switch (c) {
        case 'm': opt.module = optarg; break;
        case 'p': opt.pin = optarg; break;
        case 't': opt.token = optarg; break;
        case 'M': opt.measures = optarg; break;
        case 's': opt.seconds = atof(optarg); break;
        case 'c': objects = strtoul(optarg, NULL, 0); break;
        case 'f': opt.first = strtoul(optarg, NULL, 0); break;
        case 'n': opt.most = strtoul(optarg, NULL, 0); break;
        default: exit(2);
        }
    }
    if (!opt.module || !opt.pin || !opt.token || !opt.measures || optind != argc || opt.seconds <= 0)
        DIE("usage: --module SO --pin PIN --token LABEL --measures NAME,... [--seconds S] [--most N] [--count OBJECTS] [--first N]");
}

static bool is_wanted(CK_SLOT_ID id)
{
    CK_TOKEN_INFO info;
    size_t length = strlen(opt.token);
    if (p11->C_GetTokenInfo(id, &info) != CKR_OK || length > sizeof info.label || memcmp(info.label, opt.token, length))
        return false;
    return length == sizeof info.label || info.label[length] == ' ';
}

static void begin(void)
{
    CK_C_INITIALIZE_ARGS init = {.flags = CKF_OS_LOCKING_OK};
    CK_SLOT_ID slots[64];
    CK_ULONG n = 64, i;
    void *so = dlopen(opt.module, RTLD_NOW | RTLD_LOCAL);
    if (!so)
        DIE("%s", dlerror());
    CK_C_GetFunctionList get = (CK_C_GetFunctionList)dlsym(so, "C_GetFunctionList");
    if (!get)
        DIE("%s: no C_GetFunctionList", opt.module);
    check(get(&p11), "C_GetFunctionList");
    check(p11->C_Initialize(&init), "C_Initialize");
    check(p11->C_GetSlotList(CK_TRUE, slots, &n), "C_GetSlotList");
    for (i = 0; i < n && !is_wanted(slots[i]); i++)
        ;
    if (i == n)
        DIE("no token is called %s", opt.token);
    slot = slots[i];
    check(p11->C_OpenSession(slot, CKF_SERIAL_SESSION | CKF_RW_SESSION, NULL, NULL, &session), "C_OpenSession");
    check(p11->C_Login(session, CKU_USER, (unsigned char *)opt.pin, strlen(opt.pin)), "C_Login");
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    begin();
    calls_begin();
    char *names = strdup(opt.measures), *rest = names, *name;
    while ((name = strsep(&rest, ",")))
        run_named(name);
    free(names);
    check(p11->C_Finalize(NULL), "C_Finalize");
    return 0;
}
