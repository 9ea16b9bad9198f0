package e2e

import (
	"context"
	"os"
	"strconv"
	"testing"

	"github.com/go-json-experiment/json"

	"keybroker/internal/daemon"
)

const (
	stateFolder = "/var/lib/keybroker"
	brokerTOML  = "/etc/keybroker/broker.toml"

	// passphraseFile opens the realm that operated makes.
	passphraseFile = "/root/realm/passphrase"
)

// startAnew stops the broker for good, so that systemd's descriptor store has nothing, and starts it.
func startAnew(ctx context.Context, t *testing.T) {
	t.Helper()
	sh(ctx, t, "systemctl stop keybroker.service; systemctl reset-failed keybroker.service; systemctl start keybroker.service")
}

// coldStart starts the broker anew, and brings the passphrase if the TPM does not open the realm any more, as it may after another
// test.
func coldStart(ctx context.Context, t *testing.T) {
	t.Helper()
	startAnew(ctx, t)
	unlockedIfNeeded(ctx, t)
}

// signalBroker sends a signal to the broker's main process: KILL, STOP or CONT.
func signalBroker(ctx context.Context, t *testing.T, signal string) {
	t.Helper()
	sh(ctx, t, "systemctl kill -s "+signal+" --kill-who=main keybroker.service")
}

// statusSays waits until a line of status matches the pattern, an extended regular expression.
func statusSays(ctx context.Context, t *testing.T, pattern string) {
	t.Helper()
	sh(ctx, t, "for n in $(seq 300); do keybroker status 2>/dev/null | grep -qE '"+pattern+"' && exit; sleep 0.1; done; keybroker status; exit 1")
}

// brokerOpen waits until the realm is open.
func brokerOpen(ctx context.Context, t *testing.T) {
	t.Helper()
	statusSays(ctx, t, "^realm .* open ")
}

// brokerWaits waits until the realm wants a passphrase.
func brokerWaits(ctx context.Context, t *testing.T) {
	t.Helper()
	statusSays(ctx, t, "^realm .* waiting")
}

// unlocked brings the passphrase, and waits until the realm is open.
func unlocked(ctx context.Context, t *testing.T) {
	t.Helper()
	sh(ctx, t, "keybroker unlock --passphrase-file "+passphraseFile)
	brokerOpen(ctx, t)
}

// unlockedIfNeeded waits until the realm is open, or brings the passphrase that it waits for.
func unlockedIfNeeded(ctx context.Context, t *testing.T) {
	t.Helper()
	statusSays(ctx, t, "^realm .* (open|waiting)")
	if status(ctx, t).Realm.State == "waiting" {
		unlocked(ctx, t)
	}
}

// status is the running broker's.
func status(ctx context.Context, t *testing.T) (s daemon.Status) {
	t.Helper()
	if err := json.Unmarshal([]byte(sh(ctx, t, "keybroker status --json")), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// settings puts a broker.toml in place until the test ends. The broker reads it at its next start.
func settings(t *testing.T, text string) {
	t.Helper()
	old, err := os.ReadFile(brokerTOML)
	had := err == nil
	t.Cleanup(func() {
		if had {
			os.WriteFile(brokerTOML, old, 0o644)
		} else {
			os.Remove(brokerTOML)
		}
	})
	if err := os.WriteFile(brokerTOML, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// mainPID is the running broker's process.
func mainPID(ctx context.Context, t *testing.T) int {
	t.Helper()
	pid, err := strconv.Atoi(sh(ctx, t, "systemctl show -P MainPID keybroker.service"))
	if err != nil || pid == 0 {
		t.Fatalf("the broker does not run: %v", err)
	}
	return pid
}

// asService is a command line run by the service's user.
func asService(ctx context.Context, t *testing.T, command string) string {
	t.Helper()
	return sh(ctx, t, "setpriv --reuid 1001 --regid 1001 --clear-groups "+command)
}
