/* Parameters of message-based encryption: structures that the caller keeps, and where the module's IV and tag go. */
#ifndef PARAMETERS_H
#define PARAMETERS_H

#include "message.h"

/* Where IV (or nonce) and tag (or MAC) of one message are in the caller's memory. */
struct parameter {
    CK_BYTE *nonce;
    CK_ULONG nonce_len;
    CK_BYTE *tag;
    CK_ULONG tag_len;
};

/* CKR_MECHANISM_PARAM_INVALID for another structure than that of the mechanism, or a tag longer than any. */
CK_RV parameter_find(CK_MECHANISM_TYPE type, const void *parameter, CK_ULONG length, struct parameter *found);

/* Writes a parameter that was found, as a mechanism; the tag goes along when it is `checked`, else it is the module's to make. */
void put_parameter(struct writer *w, CK_MECHANISM_TYPE type, const void *parameter, bool checked);

/* An IV, or nothing where the caller chose it; a tag, or nothing.  What has another length than the caller's place for it is a lie:
 * nothing is written. */
void get_nonce(struct reader *r, const struct parameter *p);
CK_RV get_tag_and_output(struct reader *r, const struct parameter *p, CK_BYTE *out, CK_ULONG *out_len, bool tagged);

#endif
