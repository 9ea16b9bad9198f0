//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-json-experiment/json"
	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/inject/sink"
)

const (
	defaultStateDir = "/run/keybroker-agent"
	receiverFile    = "receiver.key"
	stateFile       = "state.json"
	lockFile        = "lock"
	stateVersion    = 1
	maxState        = 1 << 20 // octets
)

// record is what the agent remembers of one key in this boot.
type record struct {
	Place string `json:"place"`          // the sink, as configured then
	Epoch uint32 `json:"epoch,omitzero"` // 0: only begun
	ID    string `json:"id,omitzero"`    // luks: the volume's UUID
	Held  bool   `json:"held"`           // the key is in its sink
	Acked bool   `json:"acked"`          // and the broker knows
}

// state is what outlives the agent within a boot: in memory, of root alone, over switch-root and restarts.
type state struct {
	Version int                `json:"version"`
	Boot    string             `json:"boot"` // the kernel's boot id: state of another boot is of no use
	Keys    map[string]*record `json:"keys"`

	dir  string
	lock *os.File
}

// openState makes or opens the agent's folder, takes its lock, and reads what an earlier run in this boot left.
func openState(dir, boot string) (*state, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state folder: %w", err)
	}
	if err := sink.CheckFolder(dir); err != nil {
		return nil, fmt.Errorf("looking at the state folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the state folder: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("locking %s: another keybroker-agent is running: %w", dir, err)
	}
	s := &state{dir: dir, lock: lock}
	if err := s.read(boot); err != nil {
		s.close()
		return nil, fmt.Errorf("reading %s: %w; to begin anew: rm -r %s", filepath.Join(dir, stateFile), err, dir)
	}
	return s, nil
}

func (s *state) close() { s.lock.Close() }

func (s *state) read(boot string) error {
	fresh := state{Version: stateVersion, Boot: boot, Keys: map[string]*record{}, dir: s.dir, lock: s.lock}
	text, err := readBounded(filepath.Join(s.dir, stateFile), unix.O_NOFOLLOW)
	if errors.Is(err, os.ErrNotExist) {
		*s = fresh
		return wipeFile(s.dir, receiverFile) // a key without the boot's id beside it is of nobody knows when
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, s, json.RejectUnknownMembers(true)); err != nil {
		return errors.New("it is not of the form that this program writes")
	}
	if s.Version != stateVersion {
		return fmt.Errorf("it is of version %d, expected %d", s.Version, stateVersion)
	}
	if s.Boot != boot {
		*s = fresh
		return wipeFile(s.dir, receiverFile)
	}
	if s.Keys == nil {
		s.Keys = map[string]*record{}
	}
	return nil
}

// readBounded reads a file of at most maxState octets; flags are further ones for open(2), such as O_NOFOLLOW for what only this
// program writes.
func readBounded(path string, flags int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readOpen(f)
}

// readOpen reads a file that is open, of at most maxState octets.
func readOpen(f *os.File) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err == nil && len(b) > maxState {
		err = fmt.Errorf("it has more than %d octets", maxState)
	}
	return b, err
}

// save writes the state: whole, or not at all.
func (s *state) save() error {
	text, err := json.Marshal(s, json.Deterministic(true))
	if err != nil {
		return fmt.Errorf("encoding the state: %w", err)
	}
	return replaceFile(s.dir, stateFile, text, 0o600)
}

func replaceFile(dir, name string, octets []byte, mode os.FileMode) error {
	temporary := filepath.Join(dir, "."+name)
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return fmt.Errorf("writing %s: %w", name, err)
	}
	err = f.Chmod(mode)
	if err == nil {
		_, err = f.Write(octets)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(temporary, filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(temporary)
		return fmt.Errorf("writing %s: %w", name, err)
	}
	return nil
}

// receiverKey reads this boot's key pair, or makes it.
func (s *state) receiverKey() (key *inject.ReceiverKey, made bool, err error) {
	path := filepath.Join(s.dir, receiverFile)
	octets, err := readBounded(path, unix.O_NOFOLLOW)
	defer clear(octets)
	if err == nil {
		key, err = inject.ParseReceiverKey(octets)
		if err != nil {
			return nil, false, fmt.Errorf("reading %s: %w; to begin anew: rm -r %s", path, err, s.dir)
		}
		return key, false, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, false, fmt.Errorf("reading %s: %w", path, err)
	}
	if key, err = inject.NewReceiverKey(); err != nil {
		return nil, false, err
	}
	secret, err := key.Octets()
	if err != nil {
		return nil, false, fmt.Errorf("encoding the receiver's key: %w", err)
	}
	defer clear(secret)
	if err := s.save(); err != nil { // first: a key without the boot's id beside it is wiped
		return nil, false, err
	}
	return key, true, replaceFile(s.dir, receiverFile, secret, 0o400)
}

// forget wipes the receiver's key: nothing more can be fetched in this boot.
func (s *state) forget() error { return wipeFile(s.dir, receiverFile) }

func wipeFile(dir, name string) error {
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("wiping %s: %w", path, err)
	}
	info, err := f.Stat()
	if err == nil {
		_, err = f.WriteAt(make([]byte, info.Size()), 0)
	}
	if err = errors.Join(err, f.Close(), os.Remove(path)); err != nil {
		return fmt.Errorf("wiping %s: %w", path, err)
	}
	return nil
}

// of returns the record of a key if it is of this place, or a fresh one.
func (s *state) of(name, place string) *record {
	if r := s.Keys[name]; r != nil && r.Place == place {
		return r
	}
	r := &record{Place: place}
	s.Keys[name] = r
	return r
}

// bootID is the kernel's name for this boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("asking for the boot's id: %w: mount proc on /proc", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// firmwareUUID is the UUID that the firmware gives this machine, or "" where there is none.
func firmwareUUID() string {
	b, err := os.ReadFile("/sys/class/dmi/id/product_uuid")
	if err != nil {
		return ""
	}
	uuid := strings.ToLower(strings.TrimSpace(string(b)))
	if derive.CheckSubject(uuid) != nil || strings.Trim(uuid, "0-") == "" || strings.Trim(uuid, "f-") == "" {
		return ""
	}
	return uuid
}
