#!/bin/bash
# demo.sh: inside the host VM, the second half of `make demo`: phases 4 to 6.
set -euo pipefail
export PATH=/share/bin:$PATH
phase() { printf '[%s/6] %-11s %s\n' "$1" "$2" "$3"; }
field() { keybroker status --json | jq -r "$1"; }

/share/e2e/up.sh >/out/up.log 2>&1 || { cat /out/up.log; exit 1; }
phase 4 keybroker "realm $(field '.realm.id[:8]')..., slot $(field '.realm.slots[0] | "\(.kind) (\(.description))"'), held by keyholder ($(field .realm.holder_in))"

virsh -q start web1
opened=$(guest wait web1 'opened /dev')
virsh -q start web3
guest wait web3 'refused: no-policy' >/dev/null
guest wait web1 'ready:' >/dev/null
phase 5 web1 "started by libvirt; key pushed; /dev/vdb opened ${opened##*, }"
phase 6 web3 'has no policy entry; refused, as it should be'
for _ in $(seq 100); do # the acknowledgement is on its way
	keybroker vm list | grep -q '^web1 .* open' && break
	sleep 0.1
done
keybroker vm list
guest run web1 'dmsetup table data' | grep -q crypt
echo "demo: ok: web1 opened /dev/vdb with a key pushed over vsock, ${opened##*, }"
