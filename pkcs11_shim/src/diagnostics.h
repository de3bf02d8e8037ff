/* Understandable lines for whom something does not work: HSMVISOR_PKCS11_DEBUG=1 (stderr) or a file's path.
 * Never data, PINs or attribute values. */
#ifndef DIAGNOSTICS_H
#define DIAGNOSTICS_H

#include <stdbool.h>

void diagnostics_open(void);
void diagnostics_close(void);
bool diagnostics_on(void);
__attribute__((format(printf, 1, 2))) void diagnose(const char *format, ...);

#endif
