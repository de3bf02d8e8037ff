/* plain.c under a client that says all kinds of things and a thread that wants its turn, for the sanitizers.
 *
 * usage: plain_stress TURNS [alone].  alone: all threads on one processor, where it is to sleep before commands.  The TPM is a
 * function that gives back what it is asked.  What the interpreter would get is answered here, so that every command has one
 * answer, in order. */
#define _GNU_SOURCE
#include "plain.h"

#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MOST = 4096, FOLLOWED = 0x144 };

static struct plain *plain;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static uint8_t *shared; /* by whoever has the turn */
static unsigned turns, answered; /* commands */

static uint32_t give_back(unsigned char **response, uint32_t *size, uint32_t *room, unsigned char *command, uint32_t length)
{
    shared[0]++;
    answered++;
    if (*room < length) {
        free(*response);
        *response = malloc(length);
        *room = length;
    }
    memcpy(*response, command, length);
    *size = length;
    return 0;
}

static unsigned sleeps;

int __real_poll(struct pollfd *fds, nfds_t count, int ms);

int __wrap_poll(struct pollfd *fds, nfds_t count, int ms)
{
    sleeps++;
    return __real_poll(fds, count, ms);
}

static void exactly(ssize_t (*move)(int, void *, size_t), int fd, uint8_t *bytes, size_t length)
{
    for (size_t at = 0; at < length;) {
        ssize_t moved = move(fd, bytes + at, length - at);
        assert(moved > 0);
        at += (size_t)moved;
    }
}

static ssize_t put(int fd, void *bytes, size_t length)
{
    return write(fd, bytes, length);
}

static void *ask(void *argument)
{
    int fd = *(int *)argument;
    unsigned seed = 1;
    uint8_t said[MOST], heard[MOST];
    for (unsigned i = 0; i < turns; i++) {
        uint32_t length = i % 7 ? 10 + (uint32_t)rand_r(&seed) % 90 : MOST - (uint32_t)rand_r(&seed) % 9;
        uint32_t code = i % 5 ? 0x17B : FOLLOWED, first = i % 11 ? 0x40000001 : 0x4000000C;
        uint32_t told = i % 13 ? length : length + 1;
        uint8_t head[14] = {0x80, 1, (uint8_t)(told >> 24), (uint8_t)(told >> 16), (uint8_t)(told >> 8), (uint8_t)told, 0, 0,
                            (uint8_t)(code >> 8), (uint8_t)code, (uint8_t)(first >> 24), 0, 0, (uint8_t)first};
        memset(said, (int)i, length);
        memcpy(said, head, length < sizeof head ? length : sizeof head);
        uint32_t part = i % 17 ? length : length / 2; /* two writes, which may come apart */
        exactly(put, fd, said, part);
        exactly(put, fd, said + part, length - part);
        exactly(read, fd, heard, length);
        assert(!memcmp(said, heard, length));
    }
    shutdown(fd, SHUT_RDWR);
    return NULL;
}

static void *manage(void *argument)
{
    bool *ended = argument;
    while (!__atomic_load_n(ended, __ATOMIC_ACQUIRE)) {
        plain_wait(plain, 1);
        pthread_mutex_lock(&turn);
        plain_wait(plain, -1);
        shared[0]++;
        pthread_mutex_unlock(&turn);
        usleep(50);
    }
    return NULL;
}

int main(int count, char **words)
{
    assert(count == 2 || count == 3);
    turns = (unsigned)atoi(words[1]);
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    if (count == 3)
        assert(!sched_setaffinity(0, sizeof one, &one));
    uint32_t followed[] = {FOLLOWED};
    uint8_t *page = calloc(1, PLAIN_PAGE); /* exactly as large as it has to be */
    shared = calloc(1, 1);
    int pair[2];
    assert(!socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    plain = plain_new(give_back, followed, 1);
    assert(plain);
    assert(!plain_new(give_back, followed, 17));
    bool ended = false;
    pthread_t asks, manages;
    assert(!pthread_create(&asks, NULL, ask, &pair[0]));
    assert(!pthread_create(&manages, NULL, manage, &ended));
    unsigned served = 0, taken = 0;
    for (;;) {
        uint8_t left[MOST];
        size_t length = 0;
        pthread_mutex_lock(&turn);
        int outcome = plain_serve(plain, pair[1], page, 1000000);
        assert(outcome != FAULT);
        const uint8_t *from = left;
        if (outcome == TAKEN)
            from = plain_taken(plain, &length);
        else if (outcome == UNSENT)
            from = plain_unsent(plain, &length);
        memmove(left, from, length);
        pthread_mutex_unlock(&turn);
        if (outcome == TAKEN)
            assert(page[0] == 1 && !memcmp(page + 1, (uint8_t[MOST]){0}, length - 1));
        taken += outcome == TAKEN;
        exactly(put, pair[1], left, length);
        page[0] = 0;
        served++;
        if (outcome == NOTHING && recv(pair[1], left, 1, MSG_PEEK | MSG_DONTWAIT) == 0)
            break;
    }
    __atomic_store_n(&ended, true, __ATOMIC_RELEASE);
    pthread_join(asks, NULL);
    pthread_join(manages, NULL);
    printf("%u commands, %u answered by plain.c, %u for the interpreter; %u turns, %u sleeps\n", turns, answered, taken, served, sleeps);
    assert(answered > turns / 2 && taken > turns / 5);
    assert(count == 2 || sleeps > turns / 10);
    plain_free(plain);
    free(page);
    free(shared);
    close(pair[0]);
    close(pair[1]);
    return 0;
}
