/* Lanes: connections that ask for the same signature again and again, served by threads that need no interpreter (see lanes.py).
 * Guests' bytes are compared with what the interpreter has checked, never parsed. */
#ifndef LANES_H
#define LANES_H

#include <openssl/ec.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BUCKETS 13      /* of a latency histogram: token/statistics.py */
#define MAX_HEAD 64     /* bytes of a request between its id and the data */
#define MAX_TAIL 8      /* bytes behind the data */
#define MAX_REPLY_HEAD 32
#define MAX_DATA 1024
#define MAX_SIGNATURE 1024
#define ID 4            /* bytes of a frame's id, which its reply repeats */

/* While it is open, what was checked still holds.  Never opened again. */
struct gate {
    atomic_int references;
    atomic_bool shut;
};

enum kind { KIND_ECDSA, KIND_RSA, KIND_ED25519 };

/* A parsed key.  Shared between threads; libcrypto counts. */
struct key {
    EVP_PKEY *pkey;
    enum kind kind;
    size_t size; /* of a signature */
};

/* A key made ready for one thread at a time. */
struct signer {
    EVP_PKEY *pkey;
    EVP_PKEY_CTX *context;
    EVP_MD_CTX *message;
    EC_KEY *ec;
    enum kind kind;
    size_t size;
};

struct key *key_new(const uint8_t *der, size_t length, int kind, size_t size);
void key_free(struct key *key);
/* One signature in the calling thread; false when libcrypto refuses. */
bool key_sign(struct key *key, const uint8_t *data, size_t length, uint8_t *signature);

bool signer_begin(struct signer *signer, const struct key *key);
bool signer_sign(struct signer *signer, const uint8_t *data, size_t length, uint8_t *signature);
void signer_end(struct signer *signer);

struct gate *gate_new(void);
void gate_shut(struct gate *gate);
void gate_free(struct gate *gate);

/* What a lane's requests are: `id, head, data, tail`; and its replies: `id, reply_head, signature`. */
struct plan {
    uint8_t head[MAX_HEAD], tail[MAX_TAIL], reply_head[MAX_REPLY_HEAD];
    size_t head_size, data_size, tail_size, reply_head_size;
    double refuse_after; /* seconds since 1970 */
};

struct counts {
    uint64_t count;
    double seconds, last; /* `last`: since 1970 */
    uint64_t buckets[BUCKETS];
};

struct lane;
struct pool;

/* `look`: how long a thread looks for the only busy lane's next request before it sleeps. */
struct pool *pool_new(int64_t look_ns, unsigned alone, const double bounds[BUCKETS - 1]);
/* The life of a thread that serves its lanes; does not return. */
_Noreturn void pool_serve(struct pool *pool);
/* Readable when a lane has come back. */
int pool_descriptor(struct pool *pool);

/* NULL without memory.  The descriptor stays the caller's, who keeps it open until the lane is back. */
struct lane *lane_new(int fd, const struct key *key, struct gate *first, struct gate *second, const struct plan *plan);
void lane_free(struct lane *lane);

/* False when the lane cannot begin: a gate is shut. */
bool pool_enter(struct pool *pool, struct lane *lane);
/* Has all lanes come back, each after the request that it is at. */
void pool_recall(struct pool *pool);
/* A lane that has come back, or NULL. */
struct lane *pool_collect(struct pool *pool);
/* What it counted since the last time. */
void lane_counts(struct lane *lane, struct counts *counts);
/* Of one that has come back: bytes received that are not answered; bytes of a reply that the socket did not take. */
const uint8_t *lane_received(const struct lane *lane, size_t *length);
const uint8_t *lane_unsent(const struct lane *lane, size_t *length);

#endif
