/* Preloaded before libfaketime, which moves the clock of bench/chaos.py's ranks.

   Up to 0.9.10 its clock_nanosleep takes a moment of the monotonic clock, which is not moved, for one of the moved
   clock: every time.sleep of Python 3.11 then fails with "Invalid argument" (wolfcw/libfaketime#426). */
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request, struct timespec *rest)
{
    return syscall(SYS_clock_nanosleep, clock, flags, request, rest) == 0 ? 0 : errno;
}
