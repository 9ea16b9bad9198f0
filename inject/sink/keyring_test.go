//go:build linux

package sink

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestKeyring(t *testing.T) {
	runtime.LockOSThread() // a session keyring is a thread's; the thread ends with the test, and its ring with it
	if _, err := unix.KeyctlJoinSessionKeyring("keybroker-test"); err != nil {
		t.Skipf("needs a kernel with keyrings (CONFIG_KEYS) and a sandbox that lets keyctl through: %v", err)
	}
	ctx, k := context.Background(), newKey(1, false)
	for _, kind := range []string{"user", "logon"} {
		r := &Keyring{Type: kind, Description: "keybroker:disk", Ring: "@s"}
		if holds, err := r.Holds(); err != nil || holds {
			t.Fatalf("%s before: %v %v", kind, holds, err)
		}
		if _, err := r.Put(ctx, k); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		if holds, err := r.Holds(); err != nil || !holds {
			t.Fatalf("%s after: %v %v", kind, holds, err)
		}
		next := newKey(2, false)
		if _, err := r.Put(ctx, next); err != nil {
			t.Fatalf("%s, next epoch: %v", kind, err)
		}
		checkPayload(t, kind, next.Octets())
	}
}

// checkPayload: a user key can be read and is the latest, a logon key can be read by nobody.
func checkPayload(t *testing.T, kind string, want []byte) {
	t.Helper()
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_SESSION_KEYRING, kind, "keybroker:disk", 0)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 64)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, got, 0)
	if kind == "logon" {
		if !errors.Is(err, unix.EOPNOTSUPP) {
			t.Errorf("reading a logon key: %v", err)
		}
		return
	}
	if err != nil || !bytes.Equal(got[:n], want) {
		t.Errorf("read back %d octets, %v", n, err)
	}
}

func TestKeyringCheck(t *testing.T) {
	good := Keyring{Type: "user", Description: "keybroker:disk", Ring: "@u"}
	if err := good.Check(); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []Keyring{
		{"asymmetric", "keybroker:disk", "@u"}, {"user", "keybroker:disk", "@t"}, {"user", "", "@u"},
		{"user", "a b", "@u"}, {"logon", "noprefix", "@u"}, {"logon", ":x", "@u"}, {},
	} {
		if bad.Check() == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}
