/* One connection to the module: a socket, the message being written, the reply being read. */
#ifndef CONNECTION_H
#define CONNECTION_H

#include "address.h"
#include "message.h"

#include <pthread.h>

struct connection {
    int fd; /* -1 = not connected */
    struct usb *usb; /* what carries its bytes; NULL for a socket that leads to the module itself */
    uint32_t last_id;
    unsigned incarnation; /* of the application on the module that it belongs to (greeting.h); 0 = none yet */
    struct writer out;    /* the header's room stands before the message */
    uint8_t *in;
    size_t in_room, in_used;
    unsigned deadline_ms; /* that a reply may take; 0 = for ever */
    bool alone;           /* no other call of this application is in flight */
    unsigned vain;        /* looks for a reply in a row that found none */
    int64_t look_at_ns;   /* before then, calls sleep at once */
    int64_t usual_ns;     /* how long its replies take, the last ones most */
    pthread_t user;       /* the thread that used it last */
    char why[240];        /* it could not be opened, for diagnostics */
    struct connection *next;        /* in the pool */
    struct connection *next_of_all;
};

enum exchange {
    EXCHANGE_DONE,
    EXCHANGE_UNSENT,  /* the peer is gone and cannot have seen a whole request */
    EXCHANGE_LOST,    /* the peer is gone; whether it saw the request is not known */
    EXCHANGE_OVERDUE, /* no answer within the deadline */
    EXCHANGE_BROKEN,  /* the answer is no frame, or too long */
};

/* Memory for a connection that is not connected yet; NULL when there is none. */
struct connection *connection_new(void);
void connection_free(struct connection *c);

/* Connects and greets within `ms`; false with c->why.  Refused between descriptors_stop and descriptors_start. */
bool connection_open(struct connection *c, const struct address *address, unsigned ms);
void connection_close(struct connection *c);

/* Says why, as errno would; returns false. */
bool connection_failed(struct connection *c, int reason);

/* How long a reply may take from now on; 0 = for ever. */
void connection_deadline(struct connection *c, unsigned ms);

/* Another thread's call on this connection ends with EXCHANGE_LOST. */
void connection_interrupt(struct connection *c);

/* Begins a message: `call`, then the caller puts its fields into c->out. */
void connection_begin(struct connection *c, uint32_t call);

/* Sends c->out and waits for its reply, whose message is then in `reply`.  The message may be sent again.
 * option_ms: the deadline that the module is told, 0 = none. */
enum exchange connection_exchange(struct connection *c, uint32_t option_ms, struct reader *reply);

/* Overwrites what was received and sent: plaintext, a PIN. */
void connection_wipe(struct connection *c);

/* Reads the head of a reply: CKR_OK when its fields follow, else the error that it carries. */
CK_RV reply_head(struct reader *reply, uint32_t call);

#endif
