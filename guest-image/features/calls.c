/* Makes one call of each kind that the kernel configuration can leave out, and
 * prints the names of those that are not there. Run as the root user.
 *
 *   calls                      system calls and socket families
 *   calls FILE                 extended attributes and access control lists on it
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/bpf.h>
#include <linux/io_uring.h>
#include <linux/keyctl.h>
#include <linux/membarrier.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static int missing;

static void has(const char *name, long result)
{
	if (result >= 0)
		return;
	printf("%s (%s) ", name, strerror(errno));
	missing = 1;
}

/* The smallest device filter of a control group: allows everything. */
static long device_filter(void)
{
	struct bpf_insn program[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr = {
		.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE,
		.insns = (unsigned long)program,
		.insn_cnt = 2,
		.license = (unsigned long)"GPL",
	};
	return syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof attr);
}

static void calls(void)
{
	struct io_uring_params ring = { 0 };
	aio_context_t aio = 0;
	sigset_t signals;
	char byte = 0, copy;
	struct iovec from = { &byte, 1 }, to = { &copy, 1 };

	sigemptyset(&signals);
	has("io_uring", syscall(SYS_io_uring_setup, 4, &ring));
	has("aio", syscall(SYS_io_setup, 4, &aio));
	has("userfaultfd", syscall(SYS_userfaultfd, O_CLOEXEC));
	has("memfd_create", memfd_create("x", 0));
	has("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY));
	has("inotify", inotify_init1(0));
	has("signalfd", signalfd(-1, &signals, 0));
	has("timerfd", timerfd_create(CLOCK_MONOTONIC, 0));
	has("eventfd", eventfd(0, 0));
	has("epoll", epoll_create1(0));
	has("message queues", mq_open("/x", O_CREAT | O_RDWR, 0600, NULL));
	has("System V shared memory", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600));
	has("keys", syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 1));
	has("membarrier", syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0));
	has("process_vm_readv", process_vm_readv(getpid(), &to, 1, &from, 1, 0));
	has("kcmp", syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 1));
	has("landlock", syscall(SYS_landlock_create_ruleset, NULL, 0, 1));
	has("pidfd", syscall(SYS_pidfd_open, getpid(), 0));
	has("madvise for huge pages",
	    madvise(mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4 << 20,
		    MADV_HUGEPAGE));
	has("device filter of a control group", device_filter());
	has("unix sockets", socket(AF_UNIX, SOCK_SEQPACKET, 0));
	has("IPv4", socket(AF_INET, SOCK_STREAM, 0));
	has("IPv6", socket(AF_INET6, SOCK_DGRAM, 0));
	has("raw sockets", socket(AF_INET, SOCK_RAW, IPPROTO_ICMP));
	has("packet sockets", socket(AF_PACKET, SOCK_RAW, 0));
	has("vsock", socket(AF_VSOCK, SOCK_STREAM, 0));
	has("socket diagnosis", socket(AF_NETLINK, SOCK_RAW, 4));
	has("netfilter netlink", socket(AF_NETLINK, SOCK_RAW, 12));
	has("device events", socket(AF_NETLINK, SOCK_RAW, 15));
}

static void attributes(const char *file)
{
	/* An ACL in its form on disk: owner, user 1000, group, mask, others. */
	static const unsigned char acl[] = {
		2, 0, 0, 0,
		1, 0, 6, 0, 255, 255, 255, 255,
		2, 0, 4, 0, 0xe8, 3, 0, 0,
		4, 0, 4, 0, 255, 255, 255, 255,
		16, 0, 4, 0, 255, 255, 255, 255,
		32, 0, 4, 0, 255, 255, 255, 255,
	};
	/* cap_net_raw+ep, as ping has it. */
	static const unsigned char capability[] = {
		1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
	};

	has("file", open(file, O_CREAT | O_RDWR, 0644));
	has("user attributes", setxattr(file, "user.x", "x", 1, 0));
	has("trusted attributes", setxattr(file, "trusted.x", "x", 1, 0));
	has("file capabilities", setxattr(file, "security.capability", capability, sizeof capability, 0));
	has("access control lists", setxattr(file, "system.posix_acl_access", acl, sizeof acl, 0));
}

int main(int argc, char **argv)
{
	if (argc > 1)
		attributes(argv[1]);
	else
		calls();
	return missing;
}
