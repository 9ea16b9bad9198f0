#!/usr/bin/env bash
# setup.sh PHASES [PROGRAM...]: looks whether this machine can run the lab, with one line for each thing that it lacks
# and before anything is downloaded, and then installs the few packages that the machine itself gets. Everything else
# lives in a cached tree that the lab's host VM boots. PROGRAMs, each in a package of its name, are wanted besides.
set -euo pipefail

packages=(swtpm debootstrap debian-archive-keyring xz-utils)
phases=$1
shift
for program in "$@"; do
	command -v "$program" >/dev/null && continue
	packages+=("$program")
	[[ $program != gcc ]] || packages+=(libc6-dev)
done

lacks=()
lack() { lacks+=("$1"); }

check_go() {
	local version
	command -v go >/dev/null || { lack 'Go 1.26 or newer; there is no go on PATH (see https://go.dev/dl/)'; return; }
	version=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
	[[ $version =~ ^go([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] > 1 || BASH_REMATCH[2] >= 26)) ||
		lack "Go 1.26 or newer; this is $version (see https://go.dev/dl/)"
}

check_memory() {
	local kib
	kib=$(awk '/^MemTotal:/{print $2}' /proc/meminfo)
	# a machine sold as 6 GiB shows a little less
	((kib >= 5700 * 1024)) || lack "6 GiB of memory; this machine has $((kib / 1024)) MiB"
}

check_disk() {
	local folder=${XDG_CACHE_HOME:-$HOME/.cache}/keybroker kib
	! compgen -G "$folder/lab-*/complete" >/dev/null || return 0
	while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
	kib=$(df --output=avail -k "$folder" | tail -n 1)
	((kib >= 3 * 1024 * 1024)) || lack "3 GiB of free disk in $folder; there are $((kib / 1024)) MiB (XDG_CACHE_HOME chooses another place)"
}

[[ $(uname -sm) == 'Linux x86_64' ]] || lack "Linux on x86-64; this is $(uname -sm)"
check_go
check_memory
check_disk
if ((EUID)) && ! command -v sudo >/dev/null; then lack 'root, or sudo'; fi
command -v apt-get >/dev/null && command -v dpkg-query >/dev/null || lack 'apt-get: Debian, Ubuntu or one of their kin'
for line in ${lacks[@]+"${lacks[@]}"}; do echo "lab: error: this needs $line" >&2; done
((${#lacks[@]} == 0)) || exit 1

missing=()
for package in "${packages[@]}"; do
	[[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
done
phase() { printf '[1/%s] %-11s %s\n' "$phases" packages "$1"; }
if ((${#missing[@]} == 0)); then
	phase "$(printf '%-70s present' "${packages[*]}")"
	exit
fi
as_root=()
if ((EUID)); then as_root=(sudo); fi
phase "installing ${missing[*]} (${as_root[*]}${as_root:+ }apt-get install --no-install-recommends)"
start=$SECONDS
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
	${as_root[@]+"${as_root[@]}"} apt-get -q update &&
		${as_root[@]+"${as_root[@]}"} env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "${missing[@]}"
}
if ! install >"$log" 2>&1; then
	tail -n 20 "$log" >&2
	echo "lab: error: apt-get could not install ${missing[*]}" >&2
	exit 1
fi
phase "$(printf '%-70s installed in %d s' "${packages[*]}" $((SECONDS - start)))"
