#!/usr/bin/env bash
# Installs what building, testing and demonstrating nodemesh needs. Idempotent: a machine that has
# everything is left alone and answers in well under a second.
#
#   scripts/setup.sh build   the eBPF toolchain only (what `cargo build` needs)
#   scripts/setup.sh all     and the tools that the laboratory and the demo use (default)
#   scripts/setup.sh bench   and what `cargo xtask bench` measures with and compares with
#   scripts/setup.sh vm      and an emulator, and the distribution's kernel for it in target/vm
#
# The eBPF object needs `core` built from source for the BPF target, and bpf-linker built against
# the LLVM of the rustc that emits the bitcode. Two worlds provide that:
#   1. rustup can fetch rust-src, for the active toolchain or for a nightly (a stable one builds
#      `core` with RUSTC_BOOTSTRAP=1), and LLVM of the same version is packaged;
#   2. otherwise: Debian's rustc-web with its sources (rust-web-src).
# The choice is written to target/ebpf-toolchain.env, which mesh-agent/build.rs and `cargo xtask
# lint` read. It is made again when the rustc it names is gone or has another LLVM than it had.
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
env_file=target/ebpf-toolchain.env
mkdir -p target

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

apt_updated=
apt_update() {
    command -v apt-get >/dev/null || return 0
    [ -n "$apt_updated" ] || as_root apt-get update -qq
    apt_updated=yes
}

apt_install() {
    local missing=()
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
            missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return
    command -v apt-get >/dev/null || die "needs Debian's apt-get to install: ${missing[*]}"
    apt_update
    say "installing ${missing[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# The major version of the LLVM that a rustc was built with.
llvm_of() { "$1" -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p'; }

has_core_source() {
    [ -f "$("$1" --print sysroot)/lib/rustlib/src/rust/library/core/Cargo.toml" ]
}

# bpf-linker links against LLVM's development files, and must be no older than the bitcode.
has_llvm() {
    [ -x "/usr/lib/llvm-$1/bin/llvm-config" ] ||
        apt-cache show "llvm-$1-dev" 2>/dev/null | grep -q '^Package:'
}

# Prints the path of a rustc that can build `core` for BPF and whose LLVM can be installed.
choose_rustc() {
    local toolchain rustc
    if command -v rustup >/dev/null; then
        for toolchain in "$(rustup show active-toolchain | cut -d' ' -f1)" nightly; do
            rustc=$(rustup which --toolchain "$toolchain" rustc 2>/dev/null) || continue
            has_llvm "$(llvm_of "$rustc")" || continue
            has_core_source "$rustc" ||
                timeout 120 rustup component add rust-src --toolchain "$toolchain" >/dev/null 2>&1 ||
                continue
            has_core_source "$rustc" || continue
            echo "$rustc"
            return
        done
    fi
    say "rustup offers no usable rust-src: taking Debian's rustc-web"
    apt_install rustc-web rust-web-src rust-web-clippy >&2
    echo /usr/bin/rustc
}

# Whether the choice made before still stands.
toolchain_is_usable() {
    [ -f "$env_file" ] || return
    local NODEMESH_EBPF_RUSTC='' NODEMESH_EBPF_LLVM='' NODEMESH_BPF_LINKER=''
    # shellcheck disable=SC1090
    . "./$env_file"
    [ -x "$NODEMESH_EBPF_RUSTC" ] && [ -x "$NODEMESH_BPF_LINKER" ] &&
        [ "$(llvm_of "$NODEMESH_EBPF_RUSTC")" = "$NODEMESH_EBPF_LLVM" ] &&
        has_core_source "$NODEMESH_EBPF_RUSTC"
}

ebpf_toolchain() {
    if toolchain_is_usable; then return; fi
    local rustc llvm packages linker_root
    apt_update
    apt_install build-essential pkg-config ca-certificates
    rustc=$(choose_rustc)
    llvm=$(llvm_of "$rustc")
    [ -n "$llvm" ] || die "cannot tell the LLVM version of $rustc"
    packages=("llvm-$llvm-dev" "libpolly-$llvm-dev" zlib1g-dev libzstd-dev libxml2-dev)
    apt_install "${packages[@]}"
    linker_root=$PWD/target/bpf-linker/llvm-$llvm
    if [ ! -x "$linker_root/bin/bpf-linker" ]; then
        say "building bpf-linker for LLVM $llvm"
        LLVM_PREFIX="/usr/lib/llvm-$llvm" cargo install bpf-linker --locked --quiet \
            --no-default-features --features "llvm-$llvm" --root "$linker_root"
    fi
    printf '%s=%s\n' NODEMESH_EBPF_RUSTC "$rustc" NODEMESH_EBPF_LLVM "$llvm" \
        NODEMESH_BPF_LINKER "$linker_root/bin/bpf-linker" >"$env_file"
    say "eBPF toolchain: $rustc with LLVM $llvm"
}

# Packages that would start a service, now and whenever the machine starts. Debian asks policy-rc.d,
# if there is one, whether it may.
apt_install_idle() {
    local policy=/usr/sbin/policy-rc.d
    [ "$(dpkg-query -W -f='${db:Status-Abbrev}' "$@" 2>/dev/null)" != "$(printf 'ii %.0s' "$@")" ] ||
        return 0
    if [ ! -e $policy ]; then
        trap "as_root rm -f $policy" EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root install -m 755 /dev/stdin $policy
    fi
    apt_install "$@"
    if command -v systemctl >/dev/null; then
        as_root systemctl --quiet disable nginx haproxy stunnel4 2>/dev/null || true
    fi
}

lab_tools() {
    # The web server is apache2-bin: the program alone, while `apache2` would start a service.
    apt_install apache2-bin curl iproute2 nftables
}

# The kernel is unpacked, not installed: this machine goes on with its own.
vm_kernel() {
    apt_install qemu-system-x86 busybox-static cpio
    [ ! -e target/vm/complete ] || return 0
    local package version
    apt_update
    package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p')
    [ -n "$package" ] || die "no package linux-image-amd64 is known: the machine is emulated x86-64"
    say "unpacking $package"
    rm -rf target/vm
    mkdir -p target/vm
    (cd target/vm && apt-get download -qq "$package" && dpkg-deb -x ./*.deb . && rm ./*.deb)
    version=$(ls target/vm/lib/modules)
    busybox depmod -b "$PWD/target/vm" "$version"
    touch target/vm/complete
}

case $what in
build) ebpf_toolchain ;;
all)
    ebpf_toolchain
    lab_tools
    ;;
bench)
    ebpf_toolchain
    lab_tools
    apt_install wrk
    apt_install_idle nginx-light haproxy stunnel4
    ;;
vm)
    ebpf_toolchain
    lab_tools
    vm_kernel
    ;;
*) die "usage: scripts/setup.sh [build|all|bench|vm]" ;;
esac
