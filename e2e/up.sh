#!/bin/bash
# up.sh: inside the host VM, brings everything up as an operator would: keybroker installed, a realm sealed in the TPM, the
# broker running, libvirt's domains web1 and web2 with a policy, web3 without, and plain, which is nothing to keybroker.
set -euo pipefail
/share/e2e/install.sh
install -d -m 700 /root/realm
echo 'six words that nobody would guess' >/root/realm/passphrase
keybroker init --slot tpm2 --pcrs sha256:7 --slot passphrase --passphrase-file /root/realm/passphrase

cat >/etc/keybroker/policy.toml <<'POLICY'
[[service]]
name = "my-database"
uid  = [1001]

[[vm]]
uuid = "11111111-1111-4111-8111-111111111111"
name = "web1"
tier = "vm"
keys = ["disk"]

[[vm]]
uuid = "22222222-2222-4222-8222-222222222222"
name = "web2"
tier = "vm"
keys = ["disk"]
POLICY
keybroker policy check
systemctl enable -q --now keybroker.socket keybroker-{hook,admin,unlock}.socket keybroker.service
systemctl restart libvirtd.service # which looks for hooks when it starts
/share/bin/guest define web1 web2 web3 plain
