/* One connection to the module: a socket, the message being written, the reply being read. */
#ifndef CONNECTION_H
#define CONNECTION_H

#include "address.h"
#include "message.h"

struct connection {
    int fd; /* -1 = not connected */
    uint32_t last_id;
    bool alone;        /* no other call of this process is under way: its reply may be looked for without sleeping */
    unsigned patience; /* calls since looking was in vain */
    unsigned incarnation; /* of the application on the server that it belongs to */
    struct writer out;    /* the header's room stands before the message */
    uint8_t *in;
    size_t in_room;
    struct connection *next; /* in the pool */
    struct connection *next_of_all;
};

enum exchange { EXCHANGE_DONE, EXCHANGE_LOST, EXCHANGE_OVERDUE, EXCHANGE_BROKEN };

/* Connects and greets; false with errno. */
bool connection_open(struct connection *c, const struct address *address, unsigned deadline_ms);
void connection_close(struct connection *c);
void connection_free(struct connection *c);

/* Begins a message: `call`, then the caller puts its fields into c->out. */
void connection_begin(struct connection *c, uint32_t call);

/* Sends c->out and waits for its reply, whose message is then in `reply`.  The message may be sent again. */
enum exchange connection_exchange(struct connection *c, uint32_t option_ms, struct reader *reply);

/* Reads the head of a reply: CKR_OK when its fields follow, else the error that it carries. */
CK_RV reply_head(struct reader *reply, uint32_t call);

#endif
