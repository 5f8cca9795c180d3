# shellcheck shell=bash
# Functions that the scripts share. Source it; it runs nothing by itself.

# Where everything fetched or built outside the tree is kept.
EXOPATCH_CACHE=${EXOPATCH_CACHE:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/exopatch}
export EXOPATCH_CACHE

# say TEXT...: progress, on stderr, so that a script's stdout is its result alone.
say() { printf '%s\n' "$*" >&2; }

# die TEXT...: says what is wrong and what to do, and ends the script.
die() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# as_root CMD...: runs a command as root, through sudo where that is needed.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "this needs root and there is no sudo; as root, run: $*"
    fi
}

# Another script may be installing too: apt waits for it.
APT_WAITS=(-o DPkg::Lock::Timeout=600)

apt_lists_updated=
# update_apt_lists: fetches apt's package lists, once a run at most.
update_apt_lists() {
    [ -z "$apt_lists_updated" ] || return 0
    say "updating the package lists"
    as_root apt-get "${APT_WAITS[@]}" update -qq >&2 || die "apt-get update failed; is the network there?"
    apt_lists_updated=yes
}

# need_root_packages PKG...: installs those Debian packages that are missing.
need_root_packages() {
    local package missing=()
    for package in "$@"; do
        # The first line is enough: "Status: install ok installed".
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing: ${missing[*]}"
    apt_install "${missing[@]}" && return
    update_apt_lists
    apt_install "${missing[@]}" || die "apt-get could not install: ${missing[*]}"
}

apt_install() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get "${APT_WAITS[@]}" install -qq -y --no-install-recommends "$@" </dev/null >/dev/null
}

# check_rust CARGO_TOML: there is a Rust that is new enough. None is ever downloaded.
check_rust() {
    local wanted have
    wanted=$(sed -n 's/^rust-version *= *"\([0-9.]*\)".*/\1/p' "$1" | head -n 1)
    [ -n "$wanted" ] || die "$1 names no rust-version"
    { command -v rustc && command -v cargo; } >/dev/null ||
        die "no Rust toolchain found; install Rust $wanted or newer (https://rustup.rs) and put it on PATH"
    have=$(rustc --version | sed -n 's/^rustc \([0-9]*\.[0-9]*\(\.[0-9]*\)\{0,1\}\).*/\1/p')
    [ "$(printf '%s\n%s\n' "$wanted" "$have" | sort -V | head -n 1)" = "$wanted" ] ||
        die "Rust $have is too old; exopatch needs $wanted or newer (with rustup: rustup update stable)"
}

# has_hardware_kvm: this machine can run guests itself.
has_hardware_kvm() {
    [ -r /dev/kvm ] && [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo
}

# build_kernel_tests: builds the tests of kernels, which run inside the lab and are started there by path, and all that they need: sets
# $kernel_tests to their program.
build_kernel_tests() {
    guest-images/build
    cargo build --release --locked -p vmm -p tests --bins
    scripts/editions
    scripts/peers 6.1 6.12
    kernel_tests=$(cargo test --release --locked -p tests --features lab --test kernels --no-run --message-format=json |
        sed -n 's/.*"executable":"\([^"]*\/kernels-[^"]*\)".*/\1/p' | tail -n 1)
    [ -n "$kernel_tests" ] || die "cargo built no kernel tests"
}
