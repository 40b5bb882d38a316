#!/bin/sh
# Removes an installed Husk from the prefix that this script is in (share/husk).
#
#   uninstall.sh [--purge] [--destdir FOLDER]
#
# The configuration, images and the records of pods stay, and pods that run live on: a Husk that is installed again has
# them all. --purge removes configuration, images and records too, and refuses while there are pods.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
purge='' destdir=''

die() { echo "uninstall.sh: $*" >&2; exit 1; }
usage() { sed -n '2,/^set/ s/^# \{0,1\}//p' "$0"; }

while [ $# != 0 ]; do
    case $1 in
    --purge) purge=yes && shift ;;
    --destdir) destdir=${2?--destdir needs a folder} && shift 2 ;;
    --destdir=*) destdir=${1#*=} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done
[ -s "$here/files" ] || die "$here/files is missing: nothing is installed here"
[ -n "$destdir" ] || [ "$(id -u)" = 0 ] || die 'only root can remove Husk: run it with sudo'
[ -z "$destdir" ] || [ -z "$purge" ] || die '--purge is for this machine, and --destdir is not'
. "$here/purge.sh"
to=${here%/share/husk}
[ "$to" != "$here" ] || die "$here is not share/husk of a prefix"

state=$(husk_setting state_dir /var/lib/husk)
run=$(husk_setting run_dir /run/husk)
if [ -z "$destdir" ]; then
    pods=$(husk_pods "$state")
    if [ "$pods" != 0 ] && [ -n "$purge" ]; then
        die "there are $pods pods: remove them while huskd runs (crictl rmp --all --force), then try again"
    fi
    if [ -d /run/systemd/system ]; then
        systemctl --quiet disable --now huskd 2>/dev/null || true
    fi
    [ "$pods" = 0 ] || echo "uninstall.sh: $pods pods stay; they live on, and a huskd that is installed again takes them over"
fi

while read -r _ path; do
    rm -f "$to/$path"
done <"$here/files"
folders=$(cat "$here/folders" 2>/dev/null || true)
rm -f "$here/files" "$here/folders"
# A folder that Husk made stays if somebody else has put something there.
for folder in $folders; do
    rmdir "$(realpath -m "$to/$folder")" 2>/dev/null || true
done

[ -z "$destdir" ] || exit 0
[ ! -d /run/systemd/system ] || systemctl daemon-reload
if [ -n "$purge" ]; then
    husk_purge "$state" "$run"
    rm -rf --one-file-system /etc/husk
    echo 'uninstall.sh: Husk is removed, with its configuration and images'
else
    echo "uninstall.sh: Husk is removed; /etc/husk and $state stay"
fi
