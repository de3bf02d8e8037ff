/* Commands that nobody has to look at, without the interpreter (plain.py). */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLAIN_COMMAND 4096 /* bytes that a command may have */
#define PLAIN_PAGE 8192    /* of the memory that a successor sees too */

enum outcome {
    NOTHING, /* came in time, or another thread waits for the TPM; also at the end of the connection */
    TAKEN,   /* what plain_taken returns is the interpreter's */
    UNSENT,  /* all of the response but what plain_unsent returns is sent */
    FAULT,   /* plain_result is libtpms' */
};

struct plain;

/* TPMLIB_Process (tpm_library.h). */
typedef uint32_t process_fn(unsigned char **response, uint32_t *size, uint32_t *room, unsigned char *command, uint32_t length);

struct plain *plain_new(process_fn *process, const uint32_t *followed, uint32_t count);
void plain_free(struct plain *plain);
bool plain_owes(const uint8_t *page);
size_t plain_send(int fd, uint8_t *page, const uint8_t *response, size_t size, bool more);
enum outcome plain_serve(struct plain *plain, int fd, uint8_t *page, int64_t look_ns);
const uint8_t *plain_taken(const struct plain *plain, size_t *length);
const uint8_t *plain_unsent(const struct plain *plain, size_t *length);
uint32_t plain_result(const struct plain *plain);
const uint8_t *plain_answer(struct plain *plain, unsigned char *command, uint32_t length, uint32_t *size);
void plain_wait(struct plain *plain, int more);
