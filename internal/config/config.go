// Package config is the broker's own settings: where its files are, and what broker.toml says.
//
// No secret is a setting: broker.toml, the environment and the command line name at most the file that holds one.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"keybroker/internal/audit"
	"keybroker/internal/tomlfile"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

// Config is what broker.toml says, with a default for each setting that it does not have. It does not change after Load.
type Config struct {
	File string // the file that was read; empty: there is none and all settings are defaults

	Listen         []netip.AddrPort // loopback addresses for services; empty: none, the Unix socket alone. Port 0: any free one
	Realm          string           // the realm id to insist on, 32 lower-case hexadecimal digits; empty: whatever realm.json has
	TPM            string           // the TPM's device or a swtpm's Unix socket; never empty
	Slots          []string         // kinds of keyslot to try, in this order, and no others; never empty
	PassphraseFile string           // a file whose content opens a passphrase slot; empty: somebody runs `keybroker unlock`
	Libvirt        []string         // read-only sockets of libvirt, the first that answers is used; empty: no VMs on this host
	AllowLocalSNP  bool             // policy may have VMs of tier snp though this host runs VMs, and so may run theirs

	VM     VM
	Relay  Relay
	Audit  Audit
	Admin  Admin
	Log    Log
	Limits Limits
}

// VM is the table [vm].
type VM struct {
	BootWindow time.Duration // how long after its start a VM's agent is waited for; never zero
}

// Audit is the table [audit].
type Audit struct {
	Sync    time.Duration // a record of a service's key is on disk at most this much later; zero: before the key leaves
	MaxFile int64         // octets at which a new file is begun; never zero
	Reserve int64         // octets that only releases, changes by hand and the log's own records may use; never zero
}

// Admin is the table [admin]. Users are names or numbers as the operator wrote them.
type Admin struct {
	Users []string // who may change things besides root; empty: root alone
}

// Relay is the table [relay].
type Relay struct {
	// Listen are the addresses where relays' sessions are taken: of guests that prove themselves whose they are. None: nowhere.
	Listen []netip.AddrPort
}

// Log is the table [log].
type Log struct {
	Level slog.Level // zero: info
	JSON  bool       // zero: text
}

// MinConnections is the least that [limits] connections may be: users whom policy does not name have an eighth of them.
const MinConnections = 8

// Limits is the table [limits]. None is ever zero.
type Limits struct {
	Connections          int           // open connections of all services together
	ConnectionsPerCaller int           // open connections of one uid
	HeaderTimeout        time.Duration // for a request's header to arrive
	IdleTimeout          time.Duration // until a connection without requests is closed
}

// Kinds returns the kinds of keyslot that this build can open, in the order in which they are tried: those that need
// nobody first.
func Kinds() []string { return []string{tpm2.Kind, passphrase.Kind} }

// Default returns the settings of an empty broker.toml.
func Default() *Config {
	return &Config{
		Listen:  []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:7209"), netip.MustParseAddrPort("[::1]:7209")},
		TPM:     tpm2.DefaultPath,
		Slots:   Kinds(),
		Libvirt: []string{"/run/libvirt/virtqemud-sock-ro", "/run/libvirt/libvirt-sock-ro"},
		VM:      VM{BootWindow: 10 * time.Minute},
		Audit:   Audit{Sync: audit.DefaultSyncEvery, MaxFile: audit.DefaultMaxFile, Reserve: audit.DefaultReserve},
		Limits: Limits{
			Connections: 4096, ConnectionsPerCaller: 512,
			HeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute,
		},
	}
}

// Load reads the settings. File is what the operator gave with --config: it must exist. If it is empty, paths.ConfigFile is
// read if there is one. Errors name file and line, and are joined if there are several. The file must be writable by root
// and this process's user alone.
func Load(file string, paths Paths) (*Config, error) {
	name := file
	if name == "" {
		name = paths.ConfigFile
	}
	data, err := tomlfile.Read(name)
	if file == "" && errors.Is(err, fs.ErrNotExist) {
		return Default(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading settings: %w", err)
	}
	return Parse(name, data)
}

// Parse returns the settings in the text of a broker.toml. Name is for messages.
func Parse(name string, data []byte) (*Config, error) {
	t, err := tomlfile.Parse(name, data)
	if err != nil {
		return nil, err
	}
	c := Default()
	c.File = name
	readListen(t, &c.Listen, ParseListen)
	c.readRealm(t)
	c.readSlots(t)
	c.readPaths(t)
	t.Bool("allow_local_snp", &c.AllowLocalSNP)
	readTable(t, "vm", func(t *tomlfile.Table) {
		t.Duration("boot_window", &c.VM.BootWindow, time.Second, 24*time.Hour)
	})
	readTable(t, "relay", func(t *tomlfile.Table) { readListen(t, &c.Relay.Listen, parseRelay) })
	readTable(t, "audit", c.readAudit)
	readTable(t, "admin", c.readAdmin)
	readTable(t, "log", c.readLog)
	readTable(t, "limits", c.readLimits)
	if err := t.Err(); err != nil {
		return nil, err
	}
	return c, nil
}

// Warnings returns what is legal and probably not what the operator wants, one line each: it looks at the file that
// passphrase_file names and at the users of this host.
func (c *Config) Warnings() []string {
	var out []string
	const others = 0o006
	if info, err := os.Stat(c.PassphraseFile); c.PassphraseFile != "" && err == nil && info.Mode().IsRegular() && info.Mode().Perm()&others != 0 {
		out = append(out, fmt.Sprintf("passphrase_file: %s has mode %04o, which lets every user of this machine in: `chmod o-rw %s` mends that",
			c.PassphraseFile, info.Mode().Perm(), c.PassphraseFile))
	}
	for _, name := range c.Admin.Users {
		if _, err := user.Lookup(name); err == nil {
			continue
		}
		if _, err := strconv.ParseUint(name, 10, 32); err != nil {
			out = append(out, fmt.Sprintf("[admin] users: there is no user %q on this host, so the name lets nobody in", name))
		}
	}
	return out
}

func readTable(t *tomlfile.Table, key string, read func(*tomlfile.Table)) {
	if sub := t.Table(key); sub != nil {
		read(sub)
	}
}

// readListen takes a list of addresses, each once.
func readListen(t *tomlfile.Table, dst *[]netip.AddrPort, parse func(string) (netip.AddrPort, error)) {
	var addrs []string
	if !t.Strings("listen", &addrs) {
		return
	}
	*dst = nil
	for _, a := range addrs {
		ap, err := parse(a)
		switch {
		case err != nil:
			t.Errorf("listen", "%v", err)
		case ap.Port() != 0 && slices.Contains(*dst, ap):
			t.Errorf("listen", "expected each address once, got %s again", ap)
		default:
			*dst = append(*dst, ap)
		}
	}
}

// ParseListen returns the address of "127.0.0.1:7209" or "[::1]:7209". Any that is not a loopback address is refused:
// who a caller is, is known of callers on this host alone.
func ParseListen(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("expected an address and port such as \"127.0.0.1:7209\" or \"[::1]:7209\", got %.60q", s)
	}
	if !ap.Addr().IsLoopback() || ap.Addr().Is4In6() || ap.Addr().Zone() != "" {
		return netip.AddrPort{}, fmt.Errorf("expected a loopback address, 127.0.0.1 or [::1], got %.60q; "+
			"services on other hosts cannot be told apart here", s)
	}
	return ap, nil
}

// parseRelay takes any address of this host, which relays on others reach, but for "all": an operator names the networks.
func parseRelay(s string) (netip.AddrPort, error) {
	ap, err := netip.ParseAddrPort(s)
	if err != nil || ap.Addr().IsUnspecified() || ap.Addr().IsMulticast() || ap.Port() == 0 {
		return netip.AddrPort{}, fmt.Errorf("expected an address of this host and a port, such as \"10.0.0.1:7210\", got %.60q", s)
	}
	return ap, nil
}

var realmForm = regexp.MustCompile(`^[0-9a-f]{32}$`)

func (c *Config) readRealm(t *tomlfile.Table) {
	// The value is not repeated in messages: it may be a master, put here by mistake.
	if t.String("realm", &c.Realm) && c.Realm != "" && !realmForm.MatchString(c.Realm) {
		t.Errorf("realm", "expected a realm id, 32 lower-case hexadecimal digits as `keybroker status` prints, got %d characters",
			len([]rune(c.Realm)))
	}
}

func (c *Config) readSlots(t *tomlfile.Table) {
	var kinds []string
	if !t.Strings("slots", &kinds) {
		return
	}
	known := `"` + strings.Join(Kinds(), `", "`) + `"`
	for i, k := range kinds {
		if !slices.Contains(Kinds(), k) {
			t.Errorf("slots", "expected kinds of keyslot that this build can open, %s; got another at place %d", known, i+1)
		} else if slices.Contains(kinds[:i], k) {
			t.Errorf("slots", "expected each kind once, got %q again", k)
		}
	}
	if len(kinds) == 0 {
		t.Errorf("slots", "expected at least one of %s, got none, which opens nothing", known)
	}
	c.Slots = kinds
}

func (c *Config) readPaths(t *tomlfile.Table) {
	if t.String("tpm", &c.TPM) {
		checkPath(t, "tpm", c.TPM)
	}
	if t.String("passphrase_file", &c.PassphraseFile) {
		checkPath(t, "passphrase_file", c.PassphraseFile)
	}
	if !t.Strings("libvirt", &c.Libvirt) {
		return
	}
	for _, s := range c.Libvirt {
		checkPath(t, "libvirt", s)
		if len(s) > maxSocketPath {
			t.Errorf("libvirt", "expected a socket's path of at most %d octets, got %d", maxSocketPath, len(s))
		}
	}
}

// checkPath does not repeat the value: a passphrase may have been put where its file's name belongs.
func checkPath(t *tomlfile.Table, key, path string) {
	if !filepath.IsAbs(path) || strings.ContainsAny(path, "\x00\n") {
		t.Errorf(key, "expected the path of a file, beginning with /, got something else")
	}
}

func (c *Config) readAudit(t *tomlfile.Table) {
	if t.Is("sync", "always") {
		c.Audit.Sync = 0
	} else {
		t.Duration("sync", &c.Audit.Sync, time.Millisecond, 10*time.Second)
	}
	t.Size("max_file", &c.Audit.MaxFile, 64<<10, 4<<30)
	t.Size("reserve", &c.Audit.Reserve, 64<<10, 4<<30)
}

var accountForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

func (c *Config) readAdmin(t *tomlfile.Table) {
	t.Strings("users", &c.Admin.Users)
	for _, u := range c.Admin.Users {
		if !accountForm.MatchString(u) {
			t.Errorf("users", "expected names or numbers of users, got %.40q", u)
		}
	}
}

func (c *Config) readLog(t *tomlfile.Table) {
	level, format := "info", "text"
	t.Choice("level", &level, "debug", "info", "warn", "error")
	t.Choice("format", &format, "text", "json")
	// Choice has left one of the four words.
	_ = c.Log.Level.UnmarshalText([]byte(level))
	c.Log.JSON = format == "json"
}

func (c *Config) readLimits(t *tomlfile.Table) {
	t.Int("connections", &c.Limits.Connections, MinConnections, 1<<20)
	t.Int("connections_per_caller", &c.Limits.ConnectionsPerCaller, 1, 1<<20)
	t.Duration("header_timeout", &c.Limits.HeaderTimeout, 100*time.Millisecond, time.Minute)
	t.Duration("idle_timeout", &c.Limits.IdleTimeout, time.Second, time.Hour)
}
