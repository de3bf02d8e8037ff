/* Threads that sign, search and open sessions through a PKCS#11 library, while this process forks; for sanitizers.
 * usage: stress LIBRARY SECONDS THREADS [quiet].  Exit status 0: every signature was right, or refused with CKR_DEVICE_ERROR while its
 * module was being replaced.  With `quiet`, children only finalize what they inherited: over USB the library makes threads, which no sanitizer
 * itself can follow after a fork beside other threads (and see below). */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "hsmvisor-pkcs11.h"

#define KEY 5
#define CHECK(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "stress: line %d: %s\n", __LINE__, #what); \
            _exit(3); \
        } \
    } while (0)

static CK_FUNCTION_LIST *p11;
static _Atomic int ended;
static int quiet_children;
static _Atomic unsigned long done, refused;

static void sign_once(CK_SESSION_HANDLE session)
{
    CK_MECHANISM ecdsa = {0x1041, NULL, 0};
    CK_BYTE data[8], signature[256];
    CK_ULONG length = sizeof signature;
    unsigned long number = done;
    memcpy(data, &number, sizeof data);
    CK_RV rv = p11->C_SignInit(session, &ecdsa, KEY);
    if (rv == CKR_OK)
        rv = p11->C_Sign(session, data, sizeof data, signature, &length);
    CHECK(rv == CKR_OK || rv == CKR_DEVICE_ERROR);
    if (rv == CKR_OK) {
        CHECK(length == 64);
        done++;
    } else {
        refused++;
    }
}

static void in_parts(CK_SESSION_HANDLE session)
{
    CK_MECHANISM ecdsa = {0x1041, NULL, 0};
    CK_BYTE signature[64];
    CK_ULONG length = sizeof signature;
    if (p11->C_SignInit(session, &ecdsa, KEY) == CKR_OK && p11->C_SignUpdate(session, (CK_BYTE *)"part", 4) == CKR_OK)
        p11->C_SignFinal(session, signature, &length);
}

static void fork_once(int threads);

/* With an argument the thread forks as well: in the child it is the only one. */
/* AddressSanitizer of GCC 12 itself cannot fork beside threads that allocate: now and then a child hangs (one fork in 150 of a program
 * that does nothing else; none without it).  So the others rest meanwhile there; under ThreadSanitizer they go on. */
#ifdef __SANITIZE_ADDRESS__
static pthread_rwlock_t resting = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP; /* else who forks would wait for ever */
#define WORKING() pthread_rwlock_rdlock(&resting)
#define RESTING() pthread_rwlock_unlock(&resting)
#define FORKING() pthread_rwlock_wrlock(&resting)
#define FORKED(pid) ((pid) ? (void)pthread_rwlock_unlock(&resting) : (void)(resting = (pthread_rwlock_t)PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP))
#else
#define WORKING() (void)0
#define RESTING() (void)0
#define FORKING() (void)0
#define FORKED(pid) (void)(pid)
#endif

static void *work(void *argument)
{
    int forks = argument ? 3 : 0;
    CK_OBJECT_HANDLE found[8];
    CK_ULONG count;
    while (!ended) {
        CK_SESSION_HANDLE session;
        WORKING();
        if (p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &session) != CKR_OK) {
            RESTING();
            continue;
        }
        for (int i = 0; i < 20 && !ended; i++)
            sign_once(session);
        in_parts(session);
        if (p11->C_FindObjectsInit(session, NULL, 0) == CKR_OK) {
            p11->C_FindObjects(session, found, 8, &count);
            p11->C_FindObjectsFinal(session);
        }
        p11->C_CloseSession(session);
        RESTING();
        if (forks && !ended) {
            forks--;
            fork_once(0);
        }
    }
    return NULL;
}

static void *wait_for_event(void *argument)
{
    (void)argument;
    CK_SLOT_ID slot;
    CHECK(p11->C_WaitForSlotEvent(0, &slot, NULL) == CKR_CRYPTOKI_NOT_INITIALIZED);
    return NULL;
}

#ifndef __SANITIZE_THREAD__
/* A child that goes on with threads of its own.  ThreadSanitizer itself cannot follow those after a fork beside other threads. */
static void child_with_threads(void)
{
    pthread_t ids[2];
    ended = 0;
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&ids[i], NULL, work, NULL) == 0);
    nanosleep(&(struct timespec){0, 50000000}, NULL);
    ended = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(ids[i], NULL);
}

#endif

static void fork_once(int threads)
{
    FORKING();
    pid_t pid = fork();
    FORKED(pid);
    CHECK(pid >= 0);
    if (pid == 0) {
        alarm(30);
        CK_ULONG count = 0;
        CHECK(p11->C_GetSlotList(1, NULL, &count) == CKR_CRYPTOKI_NOT_INITIALIZED);
        CHECK(p11->C_Finalize(NULL) == CKR_OK);
        if (quiet_children)
            _exit(0);
        CHECK(p11->C_Initialize(NULL) == CKR_OK);
        CK_SESSION_HANDLE session;
        if (p11->C_OpenSession(0, CKF_SERIAL_SESSION, NULL, NULL, &session) == CKR_OK)
            sign_once(session);
#ifndef __SANITIZE_THREAD__
        if (threads)
            child_with_threads();
#else
        (void)threads;
#endif
        CHECK(p11->C_Finalize(NULL) == CKR_OK);
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(status == 0);
}

int main(int argc, char **argv)
{
    CHECK(argc == 4 || (argc == 5 && !strcmp(argv[4], "quiet")));
    quiet_children = argc == 5;
    void *library = dlopen(argv[1], RTLD_NOW);
    if (!library)
        fprintf(stderr, "stress: %s\n", dlerror());
    CHECK(library);
    CK_RV (*get)(CK_FUNCTION_LIST **);
    *(void **)&get = dlsym(library, "C_GetFunctionList");
    CHECK(get && get(&p11) == CKR_OK);
    time_t end = time(NULL) + atoi(argv[2]);
    int threads = atoi(argv[3]);
    pthread_t ids[64], waiter;
    CHECK(threads > 0 && threads <= 64);
    while (time(NULL) < end) {
        CK_C_INITIALIZE_ARGS arguments = {.flags = CKF_OS_LOCKING_OK};
        CHECK(p11->C_Initialize(&arguments) == CKR_OK);
        ended = 0;
        pthread_create(&waiter, NULL, wait_for_event, NULL);
        for (int i = 0; i < threads; i++)
            pthread_create(&ids[i], NULL, work, i ? NULL : &ended);
        for (int i = 0; i < 5; i++) {
            fork_once(i & 1);
            nanosleep(&(struct timespec){0, 100000000}, NULL);
        }
        ended = 1;
        for (int i = 0; i < threads; i++)
            pthread_join(ids[i], NULL);
        CHECK(p11->C_Finalize(NULL) == CKR_OK);
        pthread_join(waiter, NULL);
    }
    printf("%lu signatures, %lu refused\n", done, refused);
    return done ? 0 : 4;
}
