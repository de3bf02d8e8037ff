#include "descriptors.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool stopped;

void descriptors_lock(void)
{
    pthread_mutex_lock(&lock);
}

void descriptors_unlock(void)
{
    pthread_mutex_unlock(&lock);
}

void descriptors_child(void)
{
    pthread_mutex_init(&lock, NULL);
    stopped = false;
}

void descriptors_stop(void)
{
    pthread_mutex_lock(&lock);
    stopped = true;
    pthread_mutex_unlock(&lock);
}

void descriptors_start(void)
{
    pthread_mutex_lock(&lock);
    stopped = false;
    pthread_mutex_unlock(&lock);
}

bool descriptors_stopped(void)
{
    return stopped;
}

int above_standard(int fd)
{
    if (fd < 0 || fd > 2)
        return fd;
    int moved = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    close(fd);
    return moved;
}
