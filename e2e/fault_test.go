package e2e

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/vsock"

	"keybroker/e2e/domain"
	"keybroker/inject"
	"keybroker/internal/daemon"
)

// agentAgain ends the guest's agent and starts it anew on the console, after forgetting what the paths name.
func (g *guest) agentAgain(forget string) (from int64) {
	g.t.Helper()
	from = g.ConsoleEnd()
	g.run("killall keybroker-agent 2>/dev/null; while pidof keybroker-agent >/dev/null; do usleep 10000; done; rm -rf " + forget +
		"; (keybroker-agent >/dev/ttyS0 2>&1 </dev/null &)")
	return from
}

// TestReceiver: a boot's ticket belongs to its first receiver.
func TestReceiver(t *testing.T) {
	ctx := operated(t)
	g := admitted(ctx, t, "receiver")
	g.start()
	g.open()
	before := g.releases()

	g.run("killall keybroker-agent; cryptsetup close data")
	from := g.agentAgain("/none")
	g.expect(from, "ready:")
	g.until("released again to the same receiver", func(v daemon.VMStatus) bool {
		return v.State == daemon.VMReleased && g.releases() > before
	})

	g.run("killall keybroker-agent; cryptsetup close data")
	from = g.agentAgain("/run/keybroker-agent")
	line, _ := g.expect(from, "receiver-taken")
	if !strings.Contains(line, "keybroker vm allow receiver") {
		t.Errorf("the console says %q, expected what an administrator can do", line)
	}
	g.until("refusing the second receiver", func(v daemon.VMStatus) bool { return v.Code == "receiver-taken" })
	if out := sh(ctx, t, "keybroker audit query --json --code receiver-taken --subject "+g.UUID); out == "" {
		t.Error("the audit has no record of the second receiver")
	}
	from = g.ConsoleEnd()
	sh(ctx, t, "keybroker vm allow receiver")
	g.expect(from, "ready:")
}

// TestAnyOrder: a VM that starts while the broker or libvirt is away opens its disk without help when they are back.
func TestAnyOrder(t *testing.T) {
	ctx := operated(t)
	g := admitted(ctx, t, "order")
	t.Cleanup(func() { sh(context.WithoutCancel(ctx), t, "systemctl start keybroker.service") })

	sh(ctx, t, "systemctl stop keybroker.service keybroker.socket keybroker-{hook,admin,unlock}.socket")
	g.start()
	sh(ctx, t, "systemctl start keybroker.socket keybroker-{hook,admin,unlock}.socket keybroker.service")
	g.open()
	g.plant("first-boot")

	t.Run("kill -9 while the guest boots", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		g.reboots(func() {
			g.virsh("reset")
			signalBroker(ctx, t, "KILL")
		})
		g.open()
		g.marked("first-boot")
	})
	t.Run("libvirtd restarts", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		sh(ctx, t, "systemctl restart libvirtd.service")
		statusSays(ctx, t, "^libvirt *connected")
		g.reboots(func() { g.virsh("reset") })
		g.open()
		g.marked("first-boot")
	})
	sh(ctx, t, "keybroker audit verify --identity "+pin(ctx, t))
}

// TestHungLibvirt: a libvirtd that does not answer harms no service, and status says so.
func TestHungLibvirt(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	sh(ctx, t, "systemctl kill -s STOP libvirtd.service")
	t.Cleanup(func() { sh(context.WithoutCancel(ctx), t, "systemctl kill -s CONT libvirtd.service") })
	statusSays(ctx, t, "^libvirt *not connected")
	began := time.Now()
	asService(ctx, t, "keybroker key get my-database --hex")
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("a service's key took %v beside a hung libvirtd", took)
	}
}

// TestPlainDomainIsLeftAlone: the hook never waits for the broker on behalf of a domain without our metadata, whatever state the
// broker is in, and a domain with it starts even when the broker hangs.
func TestPlainDomainIsLeftAlone(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	plain, err := domain.Find("plain")
	if err != nil {
		t.Fatal(err)
	}
	// A hook that waits for the broker warns each time when its second is over. One that does not may still, on a machine that
	// takes a second to start a process.
	quiet := func(state string) {
		t.Helper()
		var out []byte
		for range 5 {
			cmd := exec.CommandContext(ctx, "/etc/libvirt/hooks/qemu.d/keybroker", "plain", "prepare", "begin", "-")
			cmd.Stdin = strings.NewReader(plain.XML())
			if out, err = cmd.CombinedOutput(); err != nil {
				t.Fatalf("the hook for a plain domain, the broker %s: %v %s", state, err, out)
			}
			if len(out) == 0 {
				return
			}
		}
		t.Errorf("the hook for a plain domain, the broker %s, says each time: %s", state, out)
	}
	quiet("running")
	g := admitted(ctx, t, "hung")
	t.Cleanup(func() { signalBroker(context.WithoutCancel(ctx), t, "CONT") })
	signalBroker(ctx, t, "STOP")
	quiet("hung")
	g.start()
	signalBroker(ctx, t, "CONT")
	g.open()
}

// TestImpostors: what answers the guest in the broker's place is not believed.
func TestImpostors(t *testing.T) {
	ctx := operated(t)
	g := standard(ctx, t, "web3") // it waits for ever, so that there is an agent to talk to
	from := g.ConsoleEnd()
	g.start()
	g.expect(from, "refused: no-policy")
	cid, err := g.CID(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("from a port of anybody's", func(t *testing.T) {
		conn, err := vsock.Dial(cid, inject.Port, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(guestLimit))
		if n, err := conn.Read(make([]byte, 1)); err == nil || n > 0 {
			t.Errorf("the agent talks to a port above 1023: %d octets, %v", n, err)
		}
	})
	t.Run("another identity", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		g.says("none of the pinned ones", func() { impostor(t, cid, nil) })
	})
	t.Run("the pinned identity without its key", func(t *testing.T) {
		p, err := inject.ParsePin(pin(ctx, t))
		if err != nil {
			t.Fatal(err)
		}
		g := &guest{g.Spec, t, ctx}
		g.says("not signed by the pinned issuer", func() { impostor(t, cid, p[:]) })
	})
	t.Run("an ordinary user in the guest", func(t *testing.T) {
		g := &guest{g.Spec, t, ctx}
		if result, err := g.Run(step(ctx, t), "user", "socat -u VSOCK-LISTEN:720 -"); err != nil || result.Status == 0 {
			t.Errorf("an ordinary user listens on port 720: %+v, %v", result, err)
		}
		if result, err := g.Run(step(ctx, t), "user", "socat -u VSOCK-CONNECT:2:720 -"); err != nil || result.Status == 0 {
			t.Errorf("an ordinary user dials the host's port 720: %+v, %v", result, err)
		}
		for _, address := range []string{"1", fmt.Sprint(cid)} { // the agent, from within
			g.says("expected the host, CID 2, and a source port below 1024", func() {
				if got := g.runAs("user", "socat -u VSOCK-CONNECT:"+address+":720 -"); got != "" {
					t.Errorf("the agent says %q to an ordinary user", got)
				}
			})
		}
	})
}

// says does something until the guest's console has a line with the text, which it returns: an agent says one line of a kind a
// second at most.
func (g *guest) says(text string, do func()) string {
	g.t.Helper()
	from := g.ConsoleEnd()
	for within := step(g.ctx, g.t); ; {
		do()
		soon, cancel := context.WithTimeout(within, 200*time.Millisecond)
		line, _, err := g.Wait(soon, from, text)
		cancel()
		if err == nil {
			return line
		}
		if within.Err() != nil {
			g.t.Fatal(err)
		}
	}
}

// impostor dials a guest as only the host's root can, and serves the protocol with a key of its own: in its own name, or in the
// name of another identity.
func impostor(t *testing.T, cid uint32, identity ed25519.PublicKey) {
	t.Helper()
	public, secret, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if identity == nil {
		identity = public
	}
	conn, err := daemon.DialGuest(t.Context(), cid, inject.Port)
	if err != nil {
		t.Fatal(err)
	}
	issuer := &inject.Issuer{
		Identity: identity, Log: slog.New(slog.DiscardHandler),
		Sign: func(_ context.Context, label string, fields ...[]byte) ([]byte, error) {
			return ed25519.Sign(secret, []byte(label)), nil
		},
	}
	door := inject.Door{
		Tier: inject.TierVM,
		Offer: func(context.Context, string) (string, []string, error) {
			return "33333333-3333-4333-8333-333333333333", nil, nil
		},
		Decide:  func(context.Context, *inject.Claim) (*inject.Grant, error) { return &inject.Grant{}, nil },
		Acked:   func(context.Context, *inject.Claim, []inject.Outcome) error { return nil },
		Refused: func(context.Context, *inject.Claim, inject.Refusal) {},
	}
	if err := issuer.Serve(t.Context(), conn, door); err != nil { // until the agent hangs up
		t.Error(err)
	}
}

// TestStolenUUID: a domain that takes another's UUID under a name of its own does not start.
func TestStolenUUID(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	victim := admitted(ctx, t, "victim")
	sh(ctx, t, "virsh -q undefine victim") // libvirt itself allows a UUID once
	g := define(ctx, t, domain.Spec{Name: "evil", UUID: victim.UUID, Keys: victim.Keys})
	out, err := domain.Virsh(step(ctx, t), "start", "evil")
	if err == nil || !strings.Contains(out, "wrong-vm-name") {
		t.Errorf("starting it: %v, %s; expected the policy's refusal", err, out)
	}
	if g.releases() != 0 {
		t.Error("the audit has a release")
	}
	if !strings.Contains(sh(ctx, t, "keybroker audit query --json --code wrong-vm-name"), victim.UUID) {
		t.Error("the audit has no record of the refusal")
	}
}

// serviceKey asks the Unix socket once, over a connection of its own.
func serviceKey(ctx context.Context) (string, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", "/run/keybroker/keybroker.sock")
		},
	}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/v1/keys/e2e-load", nil)
	if err != nil {
		return "", err
	}
	r.Header.Set("Keybroker", "1")
	response, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", response.StatusCode, body)
	}
	return string(body), err
}

// sealAnew binds the realm to the PCRs as they are now: a PCR that was extended stays so until the host boots, and other tests come.
func sealAnew(ctx context.Context, t *testing.T) {
	t.Helper()
	sh(ctx, t, `old=$(keybroker slot list --json | jq -r '.slots[] | select(.kind == "tpm2") | .id')
		keybroker slot add tpm2 --pcrs sha256:7 --unlock-passphrase-file /root/realm/passphrase && keybroker slot remove "$old"`)
}

// TestRestart: a restart under load fails no request and needs no TPM, even one whose PCRs have changed; a stop for good does,
// and says which PCR; the passphrase opens then.
func TestRestart(t *testing.T) {
	ctx := operated(t)
	brokerOpen(ctx, t)
	admit(ctx, t, "load", "[[service]]\nname = \"e2e-load\"\nuid = [0]\n")
	sh(ctx, t, "for n in $(seq 100); do keybroker key get e2e-load --hex && exit; sleep 0.1; done; exit 1")
	want, err := serviceKey(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sealAnew(context.WithoutCancel(ctx), t) })
	sh(ctx, t, "tpm2_pcrextend 7:sha256=0000000000000000000000000000000000000000000000000000000000000001")

	load, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	count := 0
	go func() {
		for load.Err() == nil {
			got, err := serviceKey(ctx)
			if err == nil && got != want {
				err = fmt.Errorf("another key than before")
			}
			if err != nil {
				served <- err
				return
			}
			count++
		}
		served <- nil
	}()
	sh(ctx, t, "systemctl restart keybroker.service")
	brokerOpen(ctx, t)
	stop()
	if err := <-served; err != nil || count == 0 {
		t.Errorf("after %d requests: %v", count, err)
	}
	t.Logf("%d requests over a restart", count)
	signalBroker(ctx, t, "KILL") // what is in flight then is lost; what comes after waits
	brokerOpen(ctx, t)
	if got, err := serviceKey(ctx); err != nil || got != want {
		t.Errorf("after a kill -9: %v, the same key: %v", err, got == want)
	}
	if out := sh(ctx, t, "journalctl -b --no-pager -u keybroker.service"); !strings.Contains(out, "stayed open over the restart") {
		t.Error("the journal does not say that it resumed")
	}

	startAnew(ctx, t)
	brokerWaits(ctx, t)
	if out := sh(ctx, t, "keybroker slot test --all </dev/null 2>&1 || true"); !strings.Contains(out, "PCR 7") {
		t.Errorf("slot test says %s, expected the PCR that changed", out)
	}
	unlocked(ctx, t)
	if got, err := serviceKey(ctx); err != nil || got != want {
		t.Errorf("after the passphrase: %v, the same key: %v", err, got == want)
	}
}
