//! The system calls of x86-64, and of its 32-bit programs, by the action of
//! `RuntimeDefault`. The names are from Linux's own tables
//! (`arch/x86/entry/syscalls/`), as of Linux 6.17: a call that is in no list is
//! refused, and a later call is answered as if it did not exist.

/// Calls that every container may make.
const ALLOWED: &str = "
    _llseek _newselect accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown
    chown32 chroot clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create
    epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat
    exit exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown
    fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr flistxattr flock fork fremovexattr fsetxattr
    fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait
    futex_waitv futex_wake futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid
    getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid
    gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel
    io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount
    listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lsm_get_self_attr lsm_list_modules lsm_set_self_attr lstat
    lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2
    mlockall mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
    mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at
    nanosleep newfstatat nice oldfstat oldlstat oldolduname oldstat olduname open openat openat2 pause pidfd_open
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2
    prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2
    read readahead readdir readlink readlinkat readv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages
    removexattr removexattrat rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 sendfile sendfile64 sendmmsg sendmsg
    sendto set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
    setgroups32 setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
    setreuid32 setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat sgetmask shmat shmctl shmdt shmget shutdown
    sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend socketcall socketpair splice
    ssetmask stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time
    timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
    timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname
    unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
";

/// Calls that are allowed with any one of the capabilities before them, which have their
/// names in CRI requests.
const GOVERNED: &[(&[&str], &str)] = &[
    (&["BPF", "SYS_ADMIN"], "bpf"),
    (&["DAC_READ_SEARCH"], "open_by_handle_at"),
    (&["PERFMON", "SYS_ADMIN"], "perf_event_open"),
    (
        &["SYS_ADMIN"],
        "clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie mount mount_setattr move_mount open_tree
        open_tree_attr pivot_root quotactl quotactl_fd setdomainname sethostname setns swapoff swapon umount umount2 unshare",
    ),
    (&["SYS_BOOT"], "kexec_file_load kexec_load reboot"),
    (&["SYS_MODULE"], "delete_module finit_module init_module"),
    (&["SYS_NICE"], "mbind migrate_pages move_pages set_mempolicy set_mempolicy_home_node"),
    (&["SYS_PACCT"], "acct"),
    (&["SYS_PTRACE"], "kcmp pidfd_getfd process_madvise"),
    (&["SYS_RAWIO"], "ioperm iopl"),
    (&["SYS_TIME"], "clock_settime clock_settime64 settimeofday stime"),
    (&["SYS_TTY_CONFIG"], "vhangup"),
    (&["SYSLOG", "SYS_ADMIN"], "syslog"),
];

/// The calls that a container with some capabilities may make with any
/// arguments.
pub(super) fn allowed(has: impl Fn(&str) -> bool) -> Vec<String> {
    let governed =
        GOVERNED.iter().filter(|(capabilities, _)| capabilities.iter().any(|capability| has(capability)));
    let words = [ALLOWED].into_iter().chain(governed.map(|(_, calls)| *calls));
    words.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_call_is_in_one_list() {
        let mut seen = BTreeSet::new();
        let all = GOVERNED.iter().map(|(_, calls)| *calls).chain([ALLOWED]);
        for call in all.flat_map(str::split_whitespace) {
            assert!(seen.insert(call), "{call}");
        }
    }

    #[test]
    fn every_capability_has_a_name_that_is_known() {
        for name in GOVERNED.iter().flat_map(|(capabilities, _)| *capabilities) {
            assert!(name.parse::<oci_spec::runtime::Capability>().is_ok(), "{name}");
        }
    }

    #[test]
    fn capabilities_bring_their_calls_and_no_others() {
        let with = |names: &[&str]| -> BTreeSet<String> {
            allowed(|name| names.contains(&name)).into_iter().collect()
        };
        let none = with(&[]);
        for call in
            "read openat2 futex_waitv statx ptrace seccomp clock_gettime64 landlock_restrict_self".split(' ')
        {
            assert!(none.contains(call), "{call}");
        }
        for (capability, call) in [
            ("SYS_ADMIN", "mount"),
            ("SYS_ADMIN", "unshare"),
            ("SYS_ADMIN", "bpf"),
            ("BPF", "bpf"),
            ("PERFMON", "perf_event_open"),
            ("DAC_READ_SEARCH", "open_by_handle_at"),
            ("SYS_MODULE", "finit_module"),
            ("SYS_TIME", "clock_settime64"),
            ("SYSLOG", "syslog"),
        ] {
            assert!(!none.contains(call), "{call}");
            assert!(with(&[capability]).contains(call), "{capability}: {call}");
        }
        assert!(!with(&["BPF", "NET_ADMIN"]).contains("mount"));
        let all = allowed(|_| true);
        for call in
            "io_uring_setup keyctl add_key request_key userfaultfd uselib _sysctl vm86 nfsservctl".split(' ')
        {
            assert!(!all.iter().any(|allowed| allowed == call), "{call}");
        }
        // The arguments of these decide.
        for call in ["clone", "clone3", "socket", "personality"] {
            assert!(!none.contains(call), "{call}");
        }
    }
}
