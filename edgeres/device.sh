# What `edgeres deploy` runs on a device, for any POSIX shell: one step a call. $1 names the deploy, $2 the step.
#
# The step `guard` lasts as long as the connection. It holds the device's lock, and when its input ends, or is silent
# for too long, it stops the other steps and removes what is named in made/: the one way of cleaning up, whether a
# deploy ended well, failed, or lost its connection. So what may hang is a step of its own. Facts go to stdout as
# "edgeres KEY=VALUE", all else to stderr. A step that fails says "Failed: " why, after what the tools it used said.
# No backslash stands before a quote or another backslash: some login shells (fish) read those inside of quotes.
set -u
umask 077
id=$1 step=$2
shift 2
cache=${XDG_CACHE_HOME:-$HOME/.cache}
root=$cache/edgeres
lock=$root/lock
mine=$root/deploy-$id

say() { printf 'edgeres %s=%s\n' "$1" "$2"; }
fail() {
    printf 'Failed: %s\n' "$1" >&2
    [ -z "${2-}" ] || printf 'Next: %s\n' "$2" >&2
    exit 1
}
busy() {
    fail "another deploy is at work on this device" \
        "wait for it: two at a time spoil each other's numbers (one whose connection was cut ends in two minutes)"
}

# is process $2 one of deploy $1? Its name is in their command lines, so that no stranger with an old number is meant
of_deploy() { grep -qs -e "$1" "/proc/$2/cmdline"; }

# stop the steps of deploy $1; sshd gives each command a process group of its own
stop() {
    running=
    for file in "$root/deploy-$1"/pids/*; do
        of_deploy "$1" "${file##*/}" && running="$running ${file##*/}"
    done
    for signal in TERM KILL; do
        for pid in $running; do
            kill -s "$signal" -- "-$pid" 2>/dev/null || kill -s "$signal" "$pid" 2>/dev/null
        done
        for _ in 1 2 3 4 5 6 7 8 9 10; do
            left=
            for pid in $running; do
                kill -s 0 -- "-$pid" 2>/dev/null && left=yes
            done
            [ -n "$left" ] || return 0
            sleep 0.3 2>/dev/null || sleep 1
        done
    done
}

# remove what deploy $1 made, and the record of it last
sweep() {
    for file in "$root/deploy-$1"/made/*; do
        name=${file##*/}
        [ -e "$file" ] || continue
        rm -rf -- "${root:?}/$name"
        [ ! -e "$root/$name" ] || say left "$root/$name"
    done
    rm -rf -- "$root/deploy-$1"
}

finish() {
    trap '' HUP INT TERM
    stop "$id"
    sweep "$id"
    [ "$(readlink "$lock")" != "$id.$$" ] || rm -f "$lock"
    rmdir "$root" 2>/dev/null && [ -n "$fresh" ] && rmdir "$cache" 2>/dev/null
    say end clean
}

# $1: seconds of silence after which the other side is gone; $2: "keep" to leave what is whole
guard() {
    fresh=
    [ -d "$cache" ] || fresh=yes
    mkdir -p "$root" || fail "cannot make $root on the device"
    if ! ln -s "$id.$$" "$lock" 2>/dev/null; then
        owner=$(readlink "$lock") || fail "cannot make $lock on the device" "deploy again, or see whether it has room"
        of_deploy "${owner%.*}" "${owner##*.}" && busy
        # the lock of a dead deploy; but another may take it at this moment, so what was moved is looked at again
        mv "$lock" "$lock.$id" 2>/dev/null || busy
        [ "$(readlink "$lock.$id")" = "$owner" ] || { mv -f "$lock.$id" "$lock"; busy; }
        rm -f "$lock.$id"
        ln -s "$id.$$" "$lock" 2>/dev/null || busy
    fi
    trap '' PIPE
    trap 'exit 1' HUP INT TERM
    trap finish EXIT
    mkdir -p "$mine/made" "$mine/pids" "$mine/tmp" "$mine/out" && printf '%s' $$ > "$mine/guard" ||
        fail "cannot write in $root on the device"
    for folder in "$root"/deploy-*; do
        other=${folder##*/deploy-}
        [ "$other" != "$id" ] || continue
        of_deploy "$other" "$(cat "$folder/guard" 2>/dev/null)" && busy
        stop "$other"
        sweep "$other"
    done
    [ "$2" != keep ] || : > "$mine/keep"
    say ready "$mine"
    if command -v timeout > /dev/null; then
        while [ "$(timeout "$1" dd bs=1 count=1 2>/dev/null)" = . ]; do :; done
    else
        cat > /dev/null
    fi
}

# $1: interpreter or environment -> facts about the device
look() {
    say system "$(uname -s)"
    say machine "$(uname -m)"
    [ ! -r /proc/device-tree/model ] || say model "$(tr -d '\000' < /proc/device-tree/model)"
    df -Pk "$root" | { read -r _; read -r _ _ _ free _; say free_kb "$free"; }
    py=$1
    case $py in '~/'*) py=$HOME/${py#??} ;; esac
    [ ! -d "$py" ] || py=$py/bin/python
    py=$(command -v "$py") || { say python ''; return; }
    say python "$py"
    "$py" -c '
import sys
def say(key, value):
    print("edgeres %s=%s" % (key, value))
say("version", "%d.%d.%d" % sys.version_info[:3])
if sys.version_info < (3, 10):
    sys.exit() # it is too old for edgeres, and maybe for what follows
import importlib.util as find, os
from importlib import metadata
def version(name, module):
    if find.find_spec(module) is None:
        return ""
    try:
        return metadata.version(name)
    except Exception:
        return "unknown"
try:
    say("libc", os.confstr("CS_GNU_LIBC_VERSION"))
except (AttributeError, OSError, ValueError):
    say("libc", "")
say("venv", "yes" if find.find_spec("venv") and find.find_spec("ensurepip") else "")
say("edgeres", version("edgeres", "edgeres"))
say("tensorrt", version("tensorrt", "tensorrt"))
say("cuda", version("pycuda", "pycuda") or version("cuda-python", "cuda"))
' || {
        printf 'it ended with status %s\n' $? >&2
        fail "$py does not work on the device" "mend it there, or name another interpreter with --python"
    }
}

# -> hundredths of a second that the other steps have computed, with all in their sessions (proc_pid_stat(5))
computed() {
    sum=0
    for file in /proc/[0-9]*/stat; do
        { read -r line < "$file"; } 2>/dev/null || continue
        line=${line##*) } # what stands before is a name, which may hold anything
        set -- $line
        [ $# -gt 15 ] || continue
        [ "$4" = $$ ] || [ ! -e "$mine/pids/$4" ] || sum=$((sum + ${12} + ${13} + ${14} + ${15}))
    done
    say computed "$sum"
}

# what this deploy makes is named before it is there, and with --keep no longer once it is whole
begin() { : > "$mine/made/$1"; }
whole() { [ ! -e "$mine/keep" ] || rm -f "$mine/made/$1"; }

sum_of() {
    if command -v sha256sum > /dev/null; then
        sum=$(sha256sum < "$1") && printf '%s' "${sum%% *}"
    else
        python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
    fi
}

# stdin -> file $1, whose size must be $2 and whose SHA-256 must be $3
receive() {
    cat > "$1" || fail "the device could not take the file"
    [ "$(wc -c < "$1")" -eq "$2" ] || fail "the copy was cut short"
    [ "$(sum_of "$1")" = "$3" ] || fail "what arrived on the device is not what was sent" "deploy again"
}

# $1: environment, $2: bundle, $3: its SHA-256 -> which of them are there and whole
have() {
    [ ! -e "$root/$1/edgeres-ready" ] || say env yes
    [ ! -f "$root/$2" ] || [ "$(sum_of "$root/$2")" != "$3" ] || say bundle yes
}

# stdin -> file $1 in the folder of edgeres
put() {
    receive "$mine/tmp/part" "$2" "$3"
    begin "$1"
    rm -rf -- "${root:?}/$1"
    mv "$mine/tmp/part" "$root/$1" || fail "the device could not take the file"
    whole "$1"
}

# stdin: a tar of wheels, size $3, SHA-256 $4 -> environment $1 of interpreter $2 with the requirements after them
environment() {
    env=$root/$1 name=$1 py=$2
    receive "$mine/tmp/wheels.tar" "$3" "$4"
    shift 4
    mkdir "$mine/wheels" || fail "the device could not unpack the wheels"
    tar -xf "$mine/tmp/wheels.tar" -C "$mine/wheels" || fail "the device could not unpack the wheels"
    rm -f "$mine/tmp/wheels.tar"
    begin "$name"
    rm -rf -- "$env"
    "$py" -m venv --system-site-packages "$env" >&2 || fail "the device could not make a Python environment"
    if ! install --no-index "$@" 2> "$mine/tmp/pip"; then
        cat "$mine/tmp/pip" >&2
        grep -q 'No matching distribution' "$mine/tmp/pip" || fail "pip could not install edgeres on the device"
        printf 'so the package index is asked for the rest\n' >&2
        install --no-cache-dir --retries 1 --timeout 15 "$@" || fail "the device lacks packages that edgeres needs"
    fi
    : > "$env/edgeres-ready"
    whole "$name"
}

install() {
    PIP_USER=0 "$env/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-compile \
        --no-warn-script-location --find-links "$mine/wheels" "$@" > /dev/null
}

# interpreter $1, bundle $2, work folder $3, more options -> out/result.json and what is beside it
selftest() {
    python=$1 bundle=$root/$2 work=$3
    shift 3
    if [ ! -d "$root/$work" ]; then
        begin "$work"
        whole "$work" # also if it is cut short: the next one goes on in it
    fi
    case $python in "$root"/*) ;; *) export PYTHONDONTWRITEBYTECODE=1 ;; esac # it is not ours to add files to
    # what libraries cache goes with the rest
    XDG_CACHE_HOME="$mine/tmp" "$python" -m edgeres selftest "$bundle" --work "$root/$work" \
        --json -o "$mine/out/result.json" "$@" < /dev/null > /dev/null
}

# out/ as a tar on stdout
fetch() {
    say data tar
    tar -cf - -C "$mine/out" .
}

if [ "$step" = guard ]; then
    guard "$@"
    exit
fi
[ -d "$mine" ] || fail "this deploy has ended on the device"
# what the guard must stop
: > "$mine/pids/$$"
trap 'rm -f "$mine/pids/$$"' EXIT
export TMPDIR="$mine/tmp"
"$step" "$@"
