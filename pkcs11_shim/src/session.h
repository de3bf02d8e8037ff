/* What the library knows of its sessions: enough to save round trips, and to restore them after a lost connection. */
#ifndef SESSION_H
#define SESSION_H

#include <stdbool.h>
#include <stdint.h>

#include "message.h"
#include "proof.h"

/* An Init that was not sent: it has succeeded before with the same words, so the operation's own call carries it. */
struct deferred {
    bool pending;
    CK_OBJECT_HANDLE key;
    uint32_t length;
    uint8_t mechanism[MAX_PROVEN_MECHANISM];
    CK_ULONG output_size; /* of the signature, 0 = not known yet */
};

struct session {
    _Atomic CK_SESSION_HANDLE handle;
    _Atomic bool open;
    CK_SLOT_ID slot;
    CK_FLAGS flags;
    unsigned begun[OPERATIONS];     /* incarnation() in which the module has it open; 0 = it has not */
    bool uncertain[OPERATIONS];     /* an answer was lost: the module may have it open, and is told to cancel before the next Init */
    struct deferred deferred[OPERATIONS];
    CK_MECHANISM_TYPE messages[OPERATIONS]; /* of an open message-based encryption: it says what the parameter of a message is */
    CK_OBJECT_HANDLE *found;        /* FIND_AT_ONCE handles of an open search that were fetched with it; stays allocated */
    CK_ULONG found_count, found_next;
    bool found_more;                /* the module holds the rest */
    struct session *_Atomic next;
};

#define FIND_AT_ONCE 256u

/* NULL when there is no such session.  Takes no lock.  A session's memory stays valid for ever, and so do its arrays: two threads that
 * misuse one session harm no memory. */
struct session *session_find(CK_SESSION_HANDLE handle);

enum added { ADDED, ADD_NO_MEMORY, ADD_STALE };

/* ADD_STALE: since the application `in` answered, sessions were restored into another one; that session is no more. */
enum added session_add(CK_SESSION_HANDLE handle, CK_SLOT_ID slot, CK_FLAGS flags, unsigned in);
void session_remove(struct session *session);
void sessions_clear(CK_SLOT_ID slot, bool all);
bool sessions_any(void);

/* Writes the sessions as RestoreSessions wants them, for incarnation `next`; returns how many. */
uint32_t sessions_write(struct writer *w, unsigned next);

void sessions_lock(void);
void sessions_unlock(void);
void sessions_child(void); /* in a forked child: fresh locks, no sessions */

#endif
