# shellcheck shell=sh
# Removes what Husk keeps: images, records, and the profile that it loaded. Read by uninstall.sh, and a part of the
# Debian package's postrm.

# The value of a key of the configuration, or its default.
husk_setting() { # KEY DEFAULT
    found=
    [ ! -f /etc/husk/config.toml ] ||
        found=$(sed -n "s/^ *$1 *= *[\"']\([^\"']*\)[\"'].*/\1/p" /etc/husk/config.toml | head -n 1)
    case $found in /*/*) echo "$found" ;; *) echo "$2" ;; esac
}

# The number of pods that Husk has records of: each may have a network, mounts and a VM.
husk_pods() { # STATE-DIRECTORY
    find "$1/sandboxes" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | wc -l
}

# Removes both directories; fails, and removes nothing, while a pod or a mount is in them.
husk_purge() { # STATE-DIRECTORY RUN-DIRECTORY
    if [ "$(husk_pods "$1")" != 0 ]; then
        echo "husk: $1 has the records of $(husk_pods "$1") pods, and stays: without them nobody can release their networks" >&2
        return 1
    fi
    for place in "$1" "$2"; do
        if grep -q " $place/" /proc/self/mountinfo 2>/dev/null; then
            echo "husk: something is mounted below $place, which stays: see findmnt" >&2
            return 1
        fi
    done
    rm -rf --one-file-system "$1" "$2"
    rmdir /sys/fs/cgroup/husk 2>/dev/null || true
    # No container is left that the profile confines.
    if [ -w /sys/kernel/security/apparmor/.remove ]; then
        printf husk-default >/sys/kernel/security/apparmor/.remove 2>/dev/null || true
    fi
}
