package config

import (
	"fmt"
	"path/filepath"
)

// maxSocketPath is how many octets the path of a Unix socket may have: sun_path is 108 octets with the closing zero.
const maxSocketPath = 107

// Paths is where the broker's files, folders and sockets are.
type Paths struct {
	ConfigFile string // broker.toml
	PolicyFile string // policy.toml
	PolicyDir  string // policy.d beside PolicyFile: drop-ins

	StateDir string // what outlives a reboot, 0700
	Realm    string // realm.json
	Store    string // state.db
	AuditDir string // the audit log

	Endorsements string // certificates and revocation lists for attestation reports

	RunDir       string // sockets
	Socket       string // keybroker.sock: keys for services
	HookSocket   string // hook.sock: libvirt's hook announces domains
	AdminSocket  string // admin.sock: status and changes
	UnlockSocket string // unlock.sock: a passphrase on its way to the opener
}

// DefaultPaths returns the paths of the system's own broker, below /etc, /var/lib and /run.
func DefaultPaths() Paths {
	return Paths{}.policy("/etc/keybroker/policy.toml").state("/var/lib/keybroker").run("/run/keybroker").
		WithConfigFile("/etc/keybroker/broker.toml")
}

// PathsUnder returns the paths of a broker whose files, sockets and audit log are all below dir, so that it can run beside
// the system's own as an ordinary user. A relative dir is taken from the working directory. The error says if dir is too
// long for the sockets in it.
func PathsUnder(dir string) (Paths, error) {
	if dir == "" {
		return Paths{}, fmt.Errorf("choosing paths: expected the name of a folder, got nothing")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Paths{}, fmt.Errorf("choosing paths: %w", err)
	}
	p := Paths{}.policy(filepath.Join(dir, "policy.toml")).state(dir).run(filepath.Join(dir, "run")).
		WithConfigFile(filepath.Join(dir, "broker.toml"))
	return p, p.Check()
}

// WithConfigFile returns the paths with another broker.toml.
func (p Paths) WithConfigFile(file string) Paths {
	p.ConfigFile = file
	return p
}

// WithPolicyFile returns the paths with another policy.toml, whose drop-ins are in policy.d beside it.
func (p Paths) WithPolicyFile(file string) Paths { return p.policy(file) }

func (p Paths) policy(file string) Paths {
	p.PolicyFile = file
	p.PolicyDir = filepath.Join(filepath.Dir(file), "policy.d")
	return p
}

func (p Paths) state(dir string) Paths {
	p.StateDir = dir
	p.Realm = filepath.Join(dir, "realm.json")
	p.Store = filepath.Join(dir, "state.db")
	p.AuditDir = filepath.Join(dir, "audit")
	p.Endorsements = filepath.Join(dir, "endorsements")
	return p
}

func (p Paths) run(dir string) Paths {
	p.RunDir = dir
	p.Socket = filepath.Join(dir, "keybroker.sock")
	p.HookSocket = filepath.Join(dir, "hook.sock")
	p.AdminSocket = filepath.Join(dir, "admin.sock")
	p.UnlockSocket = filepath.Join(dir, "unlock.sock")
	return p
}

// Check returns an error if a socket's path is longer than the kernel takes.
func (p Paths) Check() error {
	for _, s := range []string{p.Socket, p.HookSocket, p.AdminSocket, p.UnlockSocket} {
		if len(s) > maxSocketPath {
			return fmt.Errorf("choosing paths: a Unix socket's path has at most %d octets, got %d for %s; choose a shorter folder",
				maxSocketPath, len(s), s)
		}
	}
	return nil
}
