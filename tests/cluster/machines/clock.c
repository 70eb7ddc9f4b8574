/* A clock that is off by CLOCK_SHIFT_SECONDS, for one program and its children, by LD_PRELOAD.
 *
 * As on a host whose date is wrong: only the date differs, and waits take as long as ever. libfaketime is not used because
 * it breaks Python's sleep and locks, which wait by the monotonic clock. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const time_t AFTER_ANY_UPTIME = 1000000000;

static time_t shift_seconds(void) {
  const char *text = getenv("CLOCK_SHIFT_SECONDS");
  return text == NULL ? 0 : atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  const int code = syscall(SYS_clock_gettime, clock, now);
  if (code == 0 && clock == CLOCK_REALTIME) now->tv_sec += shift_seconds();
  return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  (void)zone;
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  *now = (struct timeval){exact.tv_sec, exact.tv_nsec / 1000};
  return 0;
}

time_t time(time_t *seconds) {
  struct timespec exact;
  clock_gettime(CLOCK_REALTIME, &exact);
  if (seconds != NULL) *seconds = exact.tv_sec;
  return exact.tv_sec;
}

/* C++ waits until a date that it has from the clock above, and the system compares it with its own. */
int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  int (*wait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *) = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
  struct timespec own = *until;
  if (own.tv_sec > AFTER_ANY_UPTIME) own.tv_sec -= shift_seconds();
  return wait(condition, mutex, &own);
}
