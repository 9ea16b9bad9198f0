package config

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// The example in the documentation: every setting.
const full = `
listen = ["127.0.0.1:7300", "[::1]:0"]
realm = "00112233445566778899aabbccddeeff"
tpm = "/run/swtpm.sock"
slots = ["passphrase"]
passphrase_file = "/etc/keybroker/passphrase"
libvirt = ["/run/libvirt/libvirt-sock-ro"]
[vm]
boot_window = "5m"
[audit]
sync = "always"
max_file = "1MiB"
reserve = "512KiB"
[admin]
users = ["alice", "1000"]
[log]
level = "debug"
format = "json"
[limits]
connections = 100
connections_per_caller = 10
header_timeout = "1s"
idle_timeout = "10s"
`

var comparePorts = cmpopts.EquateComparable(netip.AddrPort{})

func TestParseFull(t *testing.T) {
	got, err := Parse("broker.toml", []byte(full))
	if err != nil {
		t.Fatal(err)
	}
	want := &Config{
		File:           "broker.toml",
		Listen:         []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:7300"), netip.MustParseAddrPort("[::1]:0")},
		Realm:          "00112233445566778899aabbccddeeff",
		TPM:            "/run/swtpm.sock",
		Slots:          []string{"passphrase"},
		PassphraseFile: "/etc/keybroker/passphrase",
		Libvirt:        []string{"/run/libvirt/libvirt-sock-ro"},
		VM:             VM{BootWindow: 5 * time.Minute},
		Audit:          Audit{Sync: 0, MaxFile: 1 << 20, Reserve: 512 << 10},
		Admin:          Admin{Users: []string{"alice", "1000"}},
		Log:            Log{Level: slog.LevelDebug, JSON: true},
		Limits:         Limits{Connections: 100, ConnectionsPerCaller: 10, HeaderTimeout: time.Second, IdleTimeout: 10 * time.Second},
	}
	if d := cmp.Diff(want, got, comparePorts); d != "" {
		t.Errorf("settings differ (-want +got):\n%s", d)
	}
}

func TestEmptyFileIsDefaults(t *testing.T) {
	got, err := Parse("broker.toml", nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.File = "broker.toml"
	if d := cmp.Diff(want, got, comparePorts); d != "" {
		t.Errorf("settings differ (-want +got):\n%s", d)
	}
	if len(got.Listen) != 2 || len(got.Admin.Users) != 0 || got.Audit.Sync != 100*time.Millisecond {
		t.Errorf("defaults: %+v", got)
	}
}

// An empty list means none: it never falls back to the default.
func TestEmptyLists(t *testing.T) {
	got, err := Parse("broker.toml", []byte("listen = []\nlibvirt = []\n[admin]\nusers = []\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Listen) != 0 || len(got.Libvirt) != 0 || len(got.Admin.Users) != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestMistakes(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{"\nlisten = ['0.0.0.0:7209']", `broker.toml:2: "listen": expected a loopback address, 127.0.0.1 or [::1], got "0.0.0.0:7209"`},
		{"listen = ['[::]:7209']", `expected a loopback address`},
		{"listen = ['[::ffff:127.0.0.1]:7209']", `expected a loopback address`},
		{"listen = ['192.0.2.1:7209']", `expected a loopback address`},
		{"listen = ['localhost:7209']", `expected an address and port such as "127.0.0.1:7209"`},
		{"listen = [':7209']", `expected an address and port`},
		{"listen = '127.0.0.1:7209'", `expected a list of strings in [ ]`},
		{"listen = ['[::1]:1', '[::1]:1']", `expected each address once, got [::1]:1 again`},
		{"realm = 'abc'", `"realm": expected a realm id, 32 lower-case hexadecimal digits`},
		{"slots = ['tpm2', 'yubikey']", `"slots": expected kinds of keyslot that this build can open, "tpm2", "passphrase"; got another at place 2`},
		{"slots = ['tpm2', 'tpm2']", `expected each kind once, got "tpm2" again`},
		{"slots = []", `"slots": expected at least one of "tpm2", "passphrase", got none`},
		{"tpm = 'tpmrm0'", `"tpm": expected the path of a file, beginning with /`},
		{"libvirt = ['sock']", `"libvirt": expected the path of a file`},
		{"libvirt = ['/" + strings.Repeat("a", 107) + "']", `expected a socket's path of at most 107 octets, got 108`},
		{"[vm]\nboot_window = '0s'", `broker.toml:2: "boot_window" in [vm]: expected a time from "1s" to "24h0m0s"`},
		{"[vm]\nboot_window = 600", `expected a time from "1s" to "24h0m0s", got a whole number`},
		{"[audit]\nsync = 'never'", `broker.toml:2: "sync" in [audit]: expected a time from "1ms" to "10s"`},
		{"[audit]\nsync = '0s'", `"sync" in [audit]: expected a time`},
		{"[admin]\nusers = ['']", `"users" in [admin]: expected names or numbers of users, got ""`},
		{"[admin]\ngroup = 'wheel'", `broker.toml:2: unknown key "group" in [admin]`}, // the socket's own group decides
		{"[log]\nlevel = 'loud'", `"level" in [log]: expected one of "debug", "info", "warn", "error"`},
		{"[limits]\nconnections = 7", `"connections" in [limits]: expected a whole number from 8 to 1048576`},
		{"[Audit]\nsync = 'always'", `broker.toml:1: unknown key "Audit"; did you mean "audit"`},
		{"[audit]\nsink = 'always'", `broker.toml:2: unknown key "sink" in [audit]; did you mean "sync"`},
		{"passphrase = 'x'", `broker.toml:1: unknown key "passphrase"`},
		{"[relay]\nlisten = ['0.0.0.0:7210']", `broker.toml:2: "listen" in [relay]: expected an address of this host and a port`},
		{"[relay]\nlisten = ['10.0.0.1:0']", `expected an address of this host and a port`},
		{"[relay]\nlisten = ['broker.example:7210']", `expected an address of this host and a port`},
		{"[relay]\nlisten = ['10.0.0.1:1', '10.0.0.1:1']", `expected each address once, got 10.0.0.1:1 again`},
		{"allow_local_snp = 1", `"allow_local_snp": expected true or false`},
	} {
		got, err := Parse("broker.toml", []byte(c.text))
		if err == nil || !strings.Contains(err.Error(), c.want) || got != nil {
			t.Errorf("reading %q:\n got %v\nwant %s", c.text, err, c.want)
		}
		if err != nil && strings.Count(err.Error(), "\n") > 0 {
			t.Errorf("reading %q: one mistake, several errors: %v", c.text, err)
		}
	}
}

// A master or passphrase in the wrong place is in no error.
func TestErrorsHoldNoSecret(t *testing.T) {
	const secret = "8f0f6a5d2c1b"
	for _, key := range []string{"realm", "tpm", "passphrase_file", "passphrase", "slots", "libvirt"} {
		for _, value := range []string{"'" + secret + "'", "['" + secret + "']", secret, "'''" + secret} {
			_, err := Parse("broker.toml", []byte(key+" = "+value))
			if err == nil || strings.Contains(err.Error(), secret) {
				t.Errorf("%s = %s: %v", key, value, err)
			}
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	paths, err := PathsUnder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if c, err := Load("", paths); err != nil || c.File != "" {
		t.Errorf("without broker.toml: %+v, %v", c, err)
	}
	if _, err := Load(paths.ConfigFile, paths); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("--config names a missing file: %v", err)
	}
	if err := os.WriteFile(paths.ConfigFile, []byte("tpm = '/dev/tpm9'"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := Load("", paths); err != nil || c.TPM != "/dev/tpm9" || c.File != paths.ConfigFile {
		t.Errorf("with broker.toml: %+v, %v", c, err)
	}
	if err := os.Chmod(paths.ConfigFile, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := Load("", paths); err == nil || !strings.Contains(err.Error(), "run: chmod go-w") {
		t.Errorf("broker.toml that everybody writes: %v", err)
	}
}

func TestDefaultPaths(t *testing.T) {
	want := Paths{
		ConfigFile: "/etc/keybroker/broker.toml", PolicyFile: "/etc/keybroker/policy.toml", PolicyDir: "/etc/keybroker/policy.d",
		StateDir: "/var/lib/keybroker", Realm: "/var/lib/keybroker/realm.json", Store: "/var/lib/keybroker/state.db",
		AuditDir: "/var/lib/keybroker/audit", Endorsements: "/var/lib/keybroker/endorsements",
		RunDir: "/run/keybroker", Socket: "/run/keybroker/keybroker.sock", HookSocket: "/run/keybroker/hook.sock",
		AdminSocket: "/run/keybroker/admin.sock", UnlockSocket: "/run/keybroker/unlock.sock",
	}
	if d := cmp.Diff(want, DefaultPaths()); d != "" {
		t.Errorf("paths differ (-want +got):\n%s", d)
	}
	if err := DefaultPaths().Check(); err != nil {
		t.Error(err)
	}
}

// With --state-dir everything is below it.
func TestPathsUnder(t *testing.T) {
	p, err := PathsUnder("/x")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{p.ConfigFile, p.PolicyFile, p.PolicyDir, p.Realm, p.Store, p.AuditDir, p.Endorsements, p.RunDir, p.Socket,
		p.HookSocket, p.AdminSocket, p.UnlockSocket} {
		if !strings.HasPrefix(path, "/x/") {
			t.Errorf("%q is not below /x", path)
		}
	}
	p = p.WithPolicyFile("/etc/p/mine.toml").WithConfigFile("/etc/p/b.toml")
	if p.PolicyFile != "/etc/p/mine.toml" || p.PolicyDir != "/etc/p/policy.d" || p.ConfigFile != "/etc/p/b.toml" || p.StateDir != "/x" {
		t.Errorf("with files given: %+v", p)
	}
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if p, err := PathsUnder("a/../b"); err != nil || p.StateDir != filepath.Join(wd, "b") {
		t.Errorf("relative: %+v, %v", p, err)
	}
	if _, err := PathsUnder(""); err == nil {
		t.Error("no folder: no error")
	}
}

// The longest socket path that Check takes is one that the kernel takes.
func TestSocketPathLength(t *testing.T) {
	const longest = "/run/keybroker.sock"
	fits := "/" + strings.Repeat("d", maxSocketPath-len(longest)-1)
	p, err := PathsUnder(fits)
	if err != nil || len(p.Socket) != maxSocketPath {
		t.Errorf("%d octets: %v", len(p.Socket), err)
	}
	_, err = PathsUnder(fits + "d")
	if err == nil || !strings.Contains(err.Error(), "at most 107 octets, got 108") || !strings.Contains(err.Error(), "shorter folder") {
		t.Errorf("one more: %v", err)
	}
}

// An error means no settings, and settings keep what the rest of the program relies on.
func FuzzParse(f *testing.F) {
	f.Add([]byte(full))
	f.Add([]byte("listen = []\nslots = ['tpm2']"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := Parse("f", data)
		if (err == nil) != (c != nil) {
			t.Fatalf("settings %v beside error %v", c, err)
		}
		if err != nil {
			return
		}
		for _, a := range c.Listen {
			if !a.Addr().IsLoopback() {
				t.Fatalf("listens on %s", a)
			}
		}
		if len(c.Slots) == 0 || c.VM.BootWindow <= 0 || c.Audit.MaxFile <= 0 || c.Audit.Reserve <= 0 || c.TPM == "" ||
			c.Limits.Connections < MinConnections || c.Limits.HeaderTimeout <= 0 || c.Realm != "" && len(c.Realm) != 32 {
			t.Fatalf("a setting that is never zero is: %+v", c)
		}
	})
}
