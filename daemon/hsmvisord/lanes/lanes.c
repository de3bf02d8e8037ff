/* The lanes and the threads that serve them.  One thread watches, the others sign or sleep; a thread that finds nothing to do watches. */
#include "lanes.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 16
#define DESCRIPTORS 4096 /* more than a worker has (limits.MAX_OPEN_FILES) */
#define SLOW 100e-6  /* seconds */
#define TOGETHER 8u  /* signatures at most that a thread makes before it sends the first of them */
#define AVERAGE 8u   /* turns that tell how many lanes are busy */
#define MOST_BUSY 64u
#define MOST_VAIN 6u /* looks in vain in a row that still make the pause before the next one longer: 62 ms */
#define PAUSE 1e-3   /* seconds: after the second look in vain it is two of them, and then doubles */

enum state {
    AWAY,    /* the interpreter's */
    WAITING, /* for a request */
    READY,   /* in the queue */
    BUSY,    /* a thread answers it */
};

struct lane {
    int fd;
    struct gate *gates[2];
    struct plan plan;
    struct signer signer;
    size_t received, sent, reply; /* bytes */
    bool slow; /* its last signature took long */
    pthread_mutex_t counting;
    struct counts counts; /* guarded by it */
    uint8_t in[ID + MAX_HEAD + MAX_DATA + MAX_TAIL + 1]; /* no request of a plan fills it */
    uint8_t out[ID + MAX_REPLY_HEAD + MAX_SIGNATURE];
    /* guarded by the pool's lock: */
    enum state state;
    bool again;    /* more came while it was busy */
    bool recalled;
    unsigned turn;     /* the pool's number of its last one */
    uint32_t serial;   /* tells it from an earlier lane with its descriptor */
    struct lane *next; /* in a queue */
};

struct queue {
    struct lane *first, *last;
};

struct pool {
    pthread_mutex_t lock;
    pthread_cond_t work;
    int epoll, back_fd;
    int64_t look_ns;
    unsigned alone;
    double bounds[BUCKETS - 1];
    /* guarded by the lock: */
    struct queue ready, back;
    struct lane *lanes[DESCRIPTORS]; /* by descriptor, those that are not away */
    uint32_t serial;
    unsigned threads, idle; /* of them, those that sleep */
    bool watched;       /* a thread watches */
    struct lane *last;  /* the one whose turn it was */
    unsigned streak;    /* its turns in a row */
    unsigned turns;
    unsigned crowd;     /* AVERAGE times the lanes that have turns at present, by the turns between two of one lane */
    unsigned vain;      /* the watcher's looks in a row that found nothing */
    double look_at;     /* before then it sleeps at once */
};

/* ---- gates ----------------------------------------------------------------------------------------------------------- */

struct gate *gate_new(void)
{
    struct gate *gate = calloc(1, sizeof *gate);
    if (gate)
        atomic_init(&gate->references, 1);
    return gate;
}

void gate_shut(struct gate *gate)
{
    atomic_store(&gate->shut, true);
}

void gate_free(struct gate *gate)
{
    if (atomic_fetch_sub(&gate->references, 1) == 1)
        free(gate);
}

/* ---- a lane ---------------------------------------------------------------------------------------------------------- */

static bool plan_fits(const struct plan *plan)
{
    return plan->head_size <= MAX_HEAD && plan->data_size <= MAX_DATA && plan->tail_size <= MAX_TAIL &&
           plan->reply_head_size <= MAX_REPLY_HEAD;
}

struct lane *lane_new(int fd, const struct key *key, struct gate *first, struct gate *second, const struct plan *plan)
{
    struct lane *lane = plan_fits(plan) ? calloc(1, sizeof *lane) : NULL;
    if (!lane)
        return NULL;
    lane->fd = fd;
    lane->plan = *plan;
    pthread_mutex_init(&lane->counting, NULL);
    lane->gates[0] = first;
    lane->gates[1] = second;
    for (int i = 0; i < 2; i++)
        atomic_fetch_add(&lane->gates[i]->references, 1);
    if (signer_begin(&lane->signer, key))
        return lane;
    lane_free(lane);
    return NULL;
}

void lane_free(struct lane *lane)
{
    signer_end(&lane->signer);
    for (int i = 0; i < 2; i++)
        gate_free(lane->gates[i]);
    free(lane);
}

static bool lane_open(const struct lane *lane)
{
    return !atomic_load(&lane->gates[0]->shut) && !atomic_load(&lane->gates[1]->shut);
}

const uint8_t *lane_received(const struct lane *lane, size_t *length)
{
    *length = lane->received;
    return lane->in;
}

const uint8_t *lane_unsent(const struct lane *lane, size_t *length)
{
    *length = lane->reply - lane->sent;
    return lane->out + lane->sent;
}

static double seconds(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static bool is_planned(const struct lane *lane)
{
    const struct plan *plan = &lane->plan;
    const uint8_t *head = lane->in + ID, *tail = head + plan->head_size + plan->data_size;
    return lane->received == ID + plan->head_size + plan->data_size + plan->tail_size &&
           !memcmp(head, plan->head, plan->head_size) && !memcmp(tail, plan->tail, plan->tail_size);
}

/* Before the reply is sent: whoever has it finds it counted. */
static void count(const struct pool *pool, struct lane *lane, double spent, double now)
{
    struct counts *counts = &lane->counts;
    int bucket = 0;
    while (bucket < BUCKETS - 1 && spent > pool->bounds[bucket])
        bucket++;
    pthread_mutex_lock(&lane->counting);
    counts->count++;
    counts->seconds += spent;
    counts->last = now;
    counts->buckets[bucket]++;
    pthread_mutex_unlock(&lane->counting);
}

enum outcome {
    NOTHING, /* came */
    SIGNED,
    ANSWERED,
    SLOW_READER, /* answered, but for bytes that the socket did not take */
    UNPLANNED,   /* it is the interpreter's */
};

/* Up to the reply, which is ready then. */
static enum outcome sign(const struct pool *pool, struct lane *lane)
{
    const struct plan *plan = &lane->plan;
    ssize_t got = recv(lane->fd, lane->in, sizeof lane->in, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN)
        return NOTHING;
    double began = seconds(CLOCK_MONOTONIC), now = seconds(CLOCK_REALTIME);
    lane->received = got > 0 ? (size_t)got : 0;
    if (!is_planned(lane) || !lane_open(lane) || now >= plan->refuse_after)
        return UNPLANNED;
    uint8_t *signature = lane->out + ID + plan->reply_head_size;
    if (!signer_sign(&lane->signer, lane->in + ID + plan->head_size, plan->data_size, signature))
        return UNPLANNED; /* which says why */
    memcpy(lane->out, lane->in, ID);
    memcpy(lane->out + ID, plan->reply_head, plan->reply_head_size);
    lane->received = 0;
    lane->reply = ID + plan->reply_head_size + lane->signer.size;
    double spent = seconds(CLOCK_MONOTONIC) - began;
    lane->slow = spent > SLOW;
    count(pool, lane, spent, now);
    return SIGNED;
}

static enum outcome send_reply(struct lane *lane)
{
    ssize_t sent = send(lane->fd, lane->out, lane->reply, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN)
        sent = (ssize_t)lane->reply; /* nobody reads any more: the next receipt tells */
    lane->sent = sent < 0 ? 0 : (size_t)sent;
    return lane->sent == lane->reply ? ANSWERED : SLOW_READER;
}

/* ---- with the pool's lock -------------------------------------------------------------------------------------------- */

static void push(struct queue *queue, struct lane *lane)
{
    lane->next = NULL;
    if (queue->last)
        queue->last->next = lane;
    else
        queue->first = lane;
    queue->last = lane;
}

static struct lane *pop(struct queue *queue)
{
    struct lane *lane = queue->first;
    if (lane && !(queue->first = lane->next))
        queue->last = NULL;
    return lane;
}

static void make_ready(struct pool *pool, struct lane *lane)
{
    lane->state = READY;
    push(&pool->ready, lane);
}

/* Its key is let go here: that of a generation which is destroyed does not wait for the interpreter. */
static void give_back(struct pool *pool, struct lane *lane)
{
    epoll_ctl(pool->epoll, EPOLL_CTL_DEL, lane->fd, NULL);
    signer_end(&lane->signer);
    lane->state = AWAY;
    pool->lanes[lane->fd] = NULL;
    if (pool->last == lane)
        pool->last = NULL;
    push(&pool->back, lane);
    uint64_t one = 1;
    ssize_t ignored = write(pool->back_fd, &one, sizeof one);
    (void)ignored;
}

static void finish(struct pool *pool, struct lane *lane, enum outcome outcome)
{
    bool stays = outcome == NOTHING || outcome == ANSWERED;
    if (!stays || lane->recalled) {
        give_back(pool, lane);
    } else if (lane->again) {
        lane->again = false;
        make_ready(pool, lane);
    } else {
        lane->state = WAITING;
    }
}

static struct lane *take_turn(struct pool *pool)
{
    struct lane *lane = pop(&pool->ready);
    lane->state = BUSY;
    lane->reply = lane->sent = 0;
    unsigned others = pool->turns - lane->turn;
    pool->crowd += (others < MOST_BUSY ? others : MOST_BUSY) - pool->crowd / AVERAGE;
    lane->turn = pool->turns++;
    if (lane == pool->last) {
        pool->streak++;
    } else {
        pool->last = lane;
        pool->streak = 0;
    }
    return lane;
}

/* What this thread takes of what is ready; there is something.  A reply wakes its reader, who runs in our place or interrupts the
 * other threads: so what is quick is signed before the first of them is sent. */
static unsigned take_turns(struct pool *pool, struct lane **turns)
{
    bool crowded = pool->crowd >= (pool->threads + 1) * AVERAGE;
    unsigned most = crowded ? TOGETHER : 1, count = 0;
    do
        turns[count++] = take_turn(pool);
    while (count < most && pool->ready.first && !turns[0]->slow && !pool->ready.first->slow);
    /* Others have work too, or somebody else's may come and would wait long; to wake a thread costs as much as a short signature. */
    bool may_wait = turns[0]->slow && pool->streak < pool->alone;
    if (pool->idle && (count > 1 || pool->ready.first || (!pool->watched && may_wait)))
        pthread_cond_signal(&pool->work);
    return count;
}

/* ---- the threads ------------------------------------------------------------------------------------------------------- */

static int look(struct pool *pool, struct epoll_event *events, bool alone)
{
    double until = seconds(CLOCK_MONOTONIC) + (double)pool->look_ns / 1e9;
    do {
        int count = epoll_wait(pool->epoll, events, EVENTS, 0);
        if (count) {
            pool->vain = 0;
            return count;
        }
        if (!alone)
            sched_yield();
    } while (seconds(CLOCK_MONOTONIC) < until);
    if (pool->vain < MOST_VAIN)
        pool->vain++;
    pool->look_at = seconds(CLOCK_MONOTONIC) + PAUSE * ((1 << pool->vain) - 2);
    return 0;
}

/* Without the lock, by the one thread that watches. */
static int watch(struct pool *pool, struct epoll_event *events, bool alone)
{
    int count = 0;
    if (seconds(CLOCK_MONOTONIC) >= pool->look_at)
        count = look(pool, events, alone);
    while (count <= 0)
        count = epoll_wait(pool->epoll, events, EVENTS, -1);
    return count;
}

static void watch_once(struct pool *pool)
{
    struct epoll_event events[EVENTS];
    bool alone = pool->streak >= pool->alone;
    pool->watched = true;
    pthread_mutex_unlock(&pool->lock);
    int count = watch(pool, events, alone);
    pthread_mutex_lock(&pool->lock);
    pool->watched = false;
    for (int i = 0; i < count; i++) {
        struct lane *lane = pool->lanes[events[i].data.u64 % DESCRIPTORS];
        if (!lane || lane->serial != events[i].data.u64 / DESCRIPTORS)
            continue; /* it has come back meanwhile */
        if (lane->state == WAITING)
            make_ready(pool, lane);
        else
            lane->again = true;
    }
}

static void answer(struct pool *pool)
{
    struct lane *turns[TOGETHER];
    enum outcome outcomes[TOGETHER];
    unsigned count = take_turns(pool, turns);
    pthread_mutex_unlock(&pool->lock);
    for (unsigned i = 0; i < count; i++)
        outcomes[i] = sign(pool, turns[i]);
    for (unsigned i = 0; i < count; i++)
        if (outcomes[i] == SIGNED)
            outcomes[i] = send_reply(turns[i]);
    pthread_mutex_lock(&pool->lock);
    for (unsigned i = 0; i < count; i++)
        finish(pool, turns[i], outcomes[i]);
}

_Noreturn void pool_serve(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->threads++;
    for (;;) {
        if (pool->ready.first) {
            answer(pool);
        } else if (!pool->watched) {
            watch_once(pool);
        } else {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
    }
}

/* ---- the interpreter's side ---------------------------------------------------------------------------------------- */

struct pool *pool_new(int64_t look_ns, unsigned alone, const double bounds[BUCKETS - 1])
{
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    pthread_mutexattr_t adaptive; /* held for less time than it takes to sleep */
    pthread_mutexattr_init(&adaptive);
    pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&pool->lock, &adaptive);
    pthread_mutexattr_destroy(&adaptive);
    pthread_cond_init(&pool->work, NULL);
    pool->look_ns = look_ns;
    pool->alone = alone;
    memcpy(pool->bounds, bounds, sizeof pool->bounds);
    pool->epoll = epoll_create1(EPOLL_CLOEXEC);
    pool->back_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (pool->epoll >= 0 && pool->back_fd >= 0)
        return pool;
    if (pool->epoll >= 0)
        close(pool->epoll);
    if (pool->back_fd >= 0)
        close(pool->back_fd);
    free(pool);
    return NULL;
}

int pool_descriptor(struct pool *pool)
{
    return pool->back_fd;
}

bool pool_enter(struct pool *pool, struct lane *lane)
{
    if (lane->fd < 0 || lane->fd >= DESCRIPTORS)
        return false;
    pthread_mutex_lock(&pool->lock);
    lane->serial = ++pool->serial;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.u64 = (uint64_t)lane->serial * DESCRIPTORS + (uint64_t)lane->fd};
    /* Whoever shuts a gate recalls after that: so either this sees it shut, or the recall sees the lane. */
    bool good = lane_open(lane) && !epoll_ctl(pool->epoll, EPOLL_CTL_ADD, lane->fd, &event);
    if (good) {
        lane->state = WAITING;
        pool->lanes[lane->fd] = lane;
    }
    pthread_mutex_unlock(&pool->lock);
    return good;
}

void pool_recall(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    for (int fd = 0; fd < DESCRIPTORS; fd++) {
        struct lane *lane = pool->lanes[fd];
        if (lane && lane->state == WAITING)
            give_back(pool, lane);
        else if (lane)
            lane->recalled = true;
    }
    pthread_mutex_unlock(&pool->lock);
}

struct lane *pool_collect(struct pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    struct lane *lane = pop(&pool->back);
    pthread_mutex_unlock(&pool->lock);
    return lane;
}

void lane_counts(struct lane *lane, struct counts *counts)
{
    pthread_mutex_lock(&lane->counting);
    *counts = lane->counts;
    lane->counts = (struct counts){0};
    pthread_mutex_unlock(&lane->counting);
}
