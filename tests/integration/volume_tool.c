/* What the containers' busybox lacks: run in a guest, from a volume.
 *
 *   volume-tool watch DIRECTORY   print the name in each inotify event, for ever
 *   volume-tool hold FILE         lock FILE, and hold the lock for ever
 *   volume-tool try FILE          succeed if FILE is not locked by anybody
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <unistd.h>

static int watch(const char *directory) {
    char buffer[4096] __attribute__((aligned(8)));
    int events = inotify_init();
    if (inotify_add_watch(events, directory, IN_CREATE | IN_MOVED_TO | IN_DELETE) < 0) {
        perror(directory);
        return 1;
    }
    puts("watching");
    for (;;) {
        fflush(stdout);
        ssize_t len = read(events, buffer, sizeof buffer);
        for (ssize_t at = 0; at < len;) {
            struct inotify_event *event = (struct inotify_event *)(buffer + at);
            puts(event->len ? event->name : "?");
            at += sizeof *event + event->len;
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    if (!strcmp(argv[1], "watch"))
        return watch(argv[2]);
    int file = open(argv[2], O_RDWR | O_CREAT, 0644);
    if (flock(file, LOCK_EX | LOCK_NB) != 0)
        return 1;
    if (!strcmp(argv[1], "hold"))
        pause();
    return 0;
}
