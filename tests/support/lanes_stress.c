/* Lanes under clients that sign, pause, vanish and say something else, while gates are shut and all lanes recalled.
 * Built with a sanitizer by test_lanes_library.py.  usage: lanes_stress KEY.der TURNS */
#include "lanes.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CLIENTS 6
#define REQUEST 48 /* id, head of 8, data of 32, tail of 4 */
#define REPLY 76   /* id, head of 8, signature of 64 */

static int turns;
static atomic_int finished, signatures, odd;

static void fail(const char *what)
{
    fprintf(stderr, "lanes_stress: %s\n", what);
    exit(1);
}

static bool take(int fd, uint8_t *data, size_t size)
{
    for (size_t got = 0; got < size;) {
        ssize_t more = recv(fd, data + got, size - got, 0);
        if (more <= 0)
            return false;
        got += (size_t)more;
    }
    return true;
}

static void *client(void *argument)
{
    int fd = *(int *)argument;
    uint8_t request[REQUEST] = "0000headhead", reply[REPLY];
    memcpy(request + 44, "tail", 4);
    for (int turn = 1; turn <= turns; turn++) {
        memcpy(request, &turn, 4);
        bool strange = turn % 50 == 0;
        request[11] = strange ? '?' : 'd';
        if (send(fd, request, REQUEST, MSG_NOSIGNAL) != REQUEST || !take(fd, reply, REPLY))
            fail("a client got no reply");
        if (memcmp(reply, &turn, 4) || memcmp(reply + 4, strange ? "strange!" : "replyrep", 8))
            fail("a client got another reply");
        if (turn % 97 == 0)
            usleep(500);
    }
    send(fd, "half", 4, MSG_NOSIGNAL);
    close(fd);
    atomic_fetch_add(&finished, 1);
    return NULL;
}

static uint8_t *read_file(const char *path, size_t *size)
{
    static uint8_t data[4096];
    FILE *file = fopen(path, "rb");
    if (!file)
        fail("no key");
    *size = fread(data, 1, sizeof data, file);
    fclose(file);
    return data;
}

/* What the interpreter does with a request that no lane took. */
static void answer_slowly(int fd, const struct key *key, const uint8_t *request)
{
    uint8_t reply[REPLY];
    bool strange = request[11] == '?';
    memcpy(reply, request, 4);
    memcpy(reply + 4, strange ? "strange!" : "replyrep", 8);
    if (!key_sign((struct key *)key, request + 12, 32, reply + 12))
        fail("no signature");
    if (send(fd, reply, REPLY, MSG_NOSIGNAL) == REPLY)
        atomic_fetch_add(&odd, 1);
}

static void *serve(void *pool)
{
    pool_serve(pool);
}

int main(int count, char **arguments)
{
    static const double bounds[BUCKETS - 1] = {1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 2, 3, 4, 5, 6, 7};
    size_t size;
    if (count != 3)
        fail("usage: lanes_stress KEY.der TURNS");
    uint8_t *der = read_file(arguments[1], &size);
    turns = atoi(arguments[2]);
    struct key *key = key_new(der, size, KIND_ECDSA, 64);
    struct pool *pool = pool_new(100000, 8, bounds);
    if (!key || !pool)
        fail("no key or no pool");
    for (int i = 0; i < 3; i++) {
        pthread_t server;
        if (pthread_create(&server, NULL, serve, pool))
            fail("no thread");
        pthread_detach(server);
    }
    struct plan plan = {.head = "headhead", .tail = "tail", .reply_head = "replyrep", .head_size = 8, .data_size = 32,
                        .tail_size = 4, .reply_head_size = 8, .refuse_after = 1e18};
    plan.head[7] = 'd';
    struct gate *token = gate_new(), *session = gate_new();
    int ours[CLIENTS], theirs[CLIENTS], left = CLIENTS;
    struct lane *lanes[CLIENTS] = {0};
    bool open[CLIENTS];
    pthread_t threads[CLIENTS];
    for (int i = 0; i < CLIENTS; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
            fail("socketpair");
        ours[i] = pair[0];
        theirs[i] = pair[1];
        open[i] = true;
        pthread_create(&threads[i], NULL, client, &theirs[i]);
    }
    for (unsigned round = 0; left; round++) {
        for (int i = 0; i < CLIENTS; i++) {
            if (!open[i] || lanes[i])
                continue;
            lanes[i] = lane_new(ours[i], key, token, session, &plan);
            if (!lanes[i])
                fail("no lane");
            if (!pool_enter(pool, lanes[i])) {
                lane_free(lanes[i]);
                lanes[i] = NULL;
            }
        }
        if (round % 7 == 3) {
            gate_shut(token);
            pool_recall(pool);
            gate_free(token);
            token = gate_new();
        }
        struct pollfd back = {.fd = pool_descriptor(pool), .events = POLLIN};
        poll(&back, 1, 1);
        uint64_t ignored;
        if (back.revents && read(back.fd, &ignored, sizeof ignored) < 0)
            fail("eventfd");
        for (struct lane *lane; (lane = pool_collect(pool));) {
            int i = 0;
            while (lanes[i] != lane)
                i++;
            uint8_t request[REQUEST];
            size_t received, unsent;
            const uint8_t *data = lane_received(lane, &received);
            lane_unsent(lane, &unsent);
            memcpy(request, data, received < REQUEST ? received : REQUEST);
            struct counts counts;
            lane_counts(lane, &counts);
            atomic_fetch_add(&signatures, (int)counts.count);
            lane_free(lane);
            lanes[i] = NULL;
            if (unsent)
                fail("a reply that does not fit");
            if (received == REQUEST) {
                answer_slowly(ours[i], key, request);
            } else if (received) {
                close(ours[i]);
                open[i] = false;
                left--;
            }
        }
    }
    for (int i = 0; i < CLIENTS; i++)
        pthread_join(threads[i], NULL);
    gate_free(token);
    gate_free(session);
    key_free(key);
    if (signatures + odd != CLIENTS * turns)
        fail("signatures that were not counted");
    printf("%d by lanes, %d not\n", signatures, odd);
    return signatures > odd ? 0 : 1;
}
