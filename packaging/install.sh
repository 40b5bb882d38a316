#!/bin/sh
# Installs Husk from the folder that this script is in, or upgrades it. Pods that run live on.
#
#   install.sh [--prefix FOLDER] [--destdir FOLDER]
#
#   --prefix FOLDER     where programs and images go (/usr/local)
#   --destdir FOLDER    put in front of every path, and nothing is started: for makers of packages
#
# /etc/husk/config.toml is written once and never again: the defaults of this release are in share/husk/config.toml. To
# remove Husk: share/husk/uninstall.sh below the prefix.
set -eu

tree=$(cd "$(dirname "$0")" && pwd)
prefix=/usr/local destdir=''

die() { echo "install.sh: $*" >&2; exit 1; }
usage() { sed -n '2,/^set/ s/^# \{0,1\}//p' "$0"; }

while [ $# != 0 ]; do
    case $1 in
    --prefix) prefix=${2:?--prefix needs a folder} && shift 2 ;;
    --prefix=*) prefix=${1#*=} && shift ;;
    --destdir) destdir=${2?--destdir needs a folder} && shift 2 ;;
    --destdir=*) destdir=${1#*=} && shift ;;
    -h | --help) usage && exit 0 ;;
    *) usage >&2 && exit 2 ;;
    esac
done
case $prefix in /*) ;; *) die "--prefix $prefix: not an absolute path" ;; esac
prefix=${prefix%/}
to=$destdir$prefix
list=share/husk/files

[ "$(uname -sm)" = 'Linux x86_64' ] || die "Husk runs on Linux on x86-64 only, and this is $(uname -sm)"
[ -s "$tree/$list" ] || die "$tree/$list is missing: unpack the whole archive"
if [ -z "$destdir" ]; then
    [ "$(id -u)" = 0 ] || die 'only root can install Husk: run it with sudo'
    # Two of them would fight for one socket.
    # shellcheck disable=SC2016 # dpkg-query expands this
    if [ "$(dpkg-query --show --showformat='${db:Status-Status}' husk 2>/dev/null)" = installed ]; then
        die 'the Debian package husk is installed: remove it first (apt remove husk), or upgrade it instead'
    fi
fi
said=$("$tree/bin/huskd" --version 2>&1) || die "huskd does not run on this machine: $said"

# Everything is copied before the first old file is replaced, so that a full disk leaves the old release whole.
trap 'while read -r mode path; do rm -f "$to/$path.husk-new"; done <"$tree/$list"' EXIT
made=''
make_folder() { # FOLDER, below $to
    [ ! -d "$to/$1" ] || return 0
    if [ "$1" = . ]; then
        mkdir -p "$to"
        made=". $made"
        return 0
    fi
    make_folder "$(dirname "$1")"
    mkdir -p "$to/$1"
    made="$1 $made"
}
while read -r mode path; do
    make_folder "$(dirname "$path")"
    case $path in
    *.service) sed "s|@PREFIX@|$prefix|" "$tree/$path" >"$to/$path.husk-new" && chmod "$mode" "$to/$path.husk-new" ;;
    *) install -m "$mode" "$tree/$path" "$to/$path.husk-new" ;;
    esac
done <"$tree/$list"
# Renamed, never written over: running VMs and huskd keep the files that they have open.
while read -r mode path; do
    mv -f "$to/$path.husk-new" "$to/$path"
done <"$tree/$list"
trap - EXIT

# Files of the old release that this one does not have are removed.
old=$to/$list
if [ -f "$old" ]; then
    while read -r mode path; do
        cut -d ' ' -f 2- "$tree/$list" | grep -qxF "$path" || rm -f "$to/$path"
    done <"$old"
fi
install -m 644 "$tree/$list" "$old.new"
mv -f "$old.new" "$old"
# Folders that were not there before, innermost first.
for folder in $made; do echo "$folder"; done >>"$to/share/husk/folders"

config=$destdir/etc/husk/config.toml
if [ ! -e "$config" ]; then
    mkdir -p "$destdir/etc/husk"
    install -m 644 "$tree/share/husk/config.toml" "$config"
fi
echo "install.sh: $said is installed below $to"

[ -z "$destdir" ] || exit 0
if [ ! -d /run/systemd/system ]; then
    echo "install.sh: systemd does not run here: start $prefix/bin/huskd yourself (again, if it runs: pods live on)"
    exit 0
fi
systemctl daemon-reload
if systemctl --quiet is-active huskd; then
    systemctl restart huskd
    echo 'install.sh: huskd is restarted; pods live on'
else
    echo "install.sh: next: $prefix/bin/husk check, then systemctl enable --now huskd"
fi
