package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/inject"
	"keybroker/internal/config"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

// lockWait is how long a command waits for another that changes the realm file.
const lockWait = 10 * time.Second

// newSlotCost is what Argon2id costs in new passphrase slots: zero, the package's own choice, except in tests.
var newSlotCost passphrase.Config

// A slotAccess says how slots are opened and made.
type slotAccess struct {
	tpm      string           // a device or a socket
	pcrs     tpm2.Selection   // of new tpm2 slots
	open     passphraseSource // of slots that exist
	enrolled passphraseSource // of a new slot
}

// protectors makes one protector per kind.
func (a *slotAccess) protectors() (map[string]seal.Protector, error) {
	t, err := tpm2.New(tpm2.Config{Path: a.tpm, PCRs: a.pcrs})
	if err != nil {
		return nil, err
	}
	c := newSlotCost
	c.Ask, c.AskNew, c.Human = a.open.get, a.enrolled.get, a.open.human
	p, err := passphrase.New(c)
	if err != nil {
		return nil, err
	}
	return map[string]seal.Protector{tpm2.Kind: t, passphrase.Kind: p}, nil
}

// openFlags are the flags of every command that opens the realm itself.
type openFlags struct {
	tpm            string
	passphraseFile string
}

func (f *openFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&f.tpm, "tpm", "", "the TPM: a device, or a software TPM's Unix `SOCKET` (default: broker.toml's, or "+tpm2.DefaultPath+")")
	c.Flags().StringVar(&f.passphraseFile, "passphrase-file", "", "`FILE` with the passphrase, less one newline at its end; - is standard input")
}

// access returns how the realm's slots are opened by these flags.
func (f *openFlags) access(g *globals) *slotAccess {
	return &slotAccess{tpm: g.tpmPath(f.tpm), open: g.passphraseFrom(f.passphraseFile, "Passphrase of the realm", false)}
}

// tpmPath prefers the flag, then broker.toml. A broker.toml that cannot be read must not keep anybody from repairing a realm.
func (g *globals) tpmPath(flag string) string {
	if flag != "" {
		return flag
	}
	c, _, err := g.load()
	if err != nil {
		g.warn("broker.toml is not used: %v", errorLine(err))
		return tpm2.DefaultPath
	}
	return c.TPM
}

// pin returns the realm id that broker.toml insists on, or nil.
func (g *globals) pin() *seal.RealmID {
	c, _, err := g.load()
	if err != nil || c.Realm == "" {
		return nil
	}
	id, err := seal.ParseRealmID(c.Realm)
	if err != nil {
		return nil
	}
	return &id
}

func errorLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// openConfig opens a realm by the slots of an access.
func (g *globals) openConfig(a *slotAccess) (seal.OpenConfig, error) {
	p, err := a.protectors()
	return seal.OpenConfig{Protectors: p, RealmID: realmIDOf, Pin: g.pin()}, err
}

// realmIDOf computes the realm id that a master gives.
func realmIDOf(master []byte) ([16]byte, error) {
	s, err := scheduleOf(master)
	if err != nil {
		return [16]byte{}, err
	}
	defer s.Wipe()
	return s.RealmID(), nil
}

func scheduleOf(master []byte) (*derive.Schedule, error) {
	m, err := derive.NewMaster(master)
	if err != nil {
		return nil, err
	}
	defer m.Wipe()
	return derive.NewSchedule(m)
}

// identityOf returns the pin of the realm that has this first master.
func identityOf(master []byte) (string, error) {
	s, err := scheduleOf(master)
	if err != nil {
		return "", err
	}
	defer s.Wipe()
	return inject.PinOf(s.Identity()).String(), nil
}

// openRealm opens the realm in this process, by any slot. The caller closes it.
func (g *globals) openRealm(ctx context.Context, f *openFlags) (*seal.Opened, error) {
	if err := hardenProcess(); err != nil {
		return nil, err
	}
	file, _, err := g.loadRealm()
	if err != nil {
		return nil, err
	}
	c, err := g.openConfig(f.access(g))
	if err != nil {
		return nil, err
	}
	o, err := file.Open(ctx, c)
	return o, realmHint(err)
}

// lockRealm takes the realm file's lock.
func lockRealm(ctx context.Context, paths config.Paths) (*seal.Locked, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	l, err := seal.Lock(ctx, paths.Realm)
	return l, realmHint(err)
}

// hardenProcess keeps what this process holds out of core dumps, out of traces, and away from other processes of its user. It
// does what it can, and says what it cannot.
func hardenProcess() error {
	debug.SetTraceback("none")
	err := errors.Join(
		os.NewSyscallError("setrlimit RLIMIT_CORE", unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})),
		os.NewSyscallError("prctl PR_SET_DUMPABLE", unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)),
		os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", noNewPrivileges()),
	)
	if err != nil {
		return fmt.Errorf("forbidding core dumps, traces and new privileges: %w", err)
	}
	return nil
}

// noNewPrivileges holds on every thread; where cgo keeps Go from that, on this one.
func noNewPrivileges() error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	switch errno {
	case 0:
		return nil
	case unix.ENOTSUP:
		return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return errno
}

// loadRealm reads the realm file.
func (g *globals) loadRealm() (*seal.File, config.Paths, error) {
	paths, err := g.paths()
	if err != nil {
		return nil, paths, err
	}
	file, err := seal.Load(paths.Realm)
	if !errors.Is(err, fs.ErrNotExist) {
		return file, paths, realmHint(err)
	}
	what := paths.Realm
	if missing(paths.StateDir) {
		what = paths.StateDir
	}
	return nil, paths, hintedError{fmt.Errorf("no realm: there is no %s", what), "`keybroker init --slot tpm2` makes one, and --state-dir names another place"}
}

// realmHint adds what a user can do about an error of the realm file or its slots.
func realmHint(err error) error {
	var hinted hintedError
	if err == nil || errors.As(err, &hinted) {
		return err
	}
	for _, h := range hints {
		if errors.Is(err, h.is) {
			return hintedError{err, h.hint}
		}
	}
	return err
}

// hints say what to do next, by the first error that matches.
var hints = []struct {
	is   error
	hint string
}{
	{seal.ErrEdited, "nothing of it is used; restore realm.json from a copy that you trust"},
	{seal.ErrNewer, "install the release that wrote this realm file, or a later one"},
	{seal.ErrOtherRealm, "is this the right realm.json? `realm` in broker.toml says which one is expected"},
	{seal.ErrExists, "to make a new realm, move the old realm.json away: without it, every key of that realm is lost"},
	{seal.ErrBusy, "try again when the other command has ended"},
	{seal.ErrSlotNotFound, "`keybroker slot list` shows the slots"},
	{passphrase.ErrTooShort, "several words that have nothing to do with each other are easy to keep and hard to guess"},
	{tpm2.ErrPCRChanged, "if the change is yours (firmware, Secure Boot): open by another slot, `keybroker slot add tpm2`, then remove the old one"},
	{tpm2.ErrOtherTPM, "open by another slot, then `keybroker slot add tpm2` binds the realm to this TPM"},
	{tpm2.ErrMissing, "is the TPM enabled in the firmware? --tpm PATH names another; another slot opens without it"},
	{tpm2.ErrNoBank, "`tpm2_pcrread` shows the banks; --pcrs selects others"},
	{tpm2.ErrBusy, "use /dev/tpmrm0, which the kernel shares out, and try again"},
	{fs.ErrPermission, "run it as root"},
}

// describe returns what a slot is bound to, from its public parameters.
func describe(kind string, params jsontext.Value) string {
	a := slotAccess{tpm: tpm2.DefaultPath}
	protectors, err := a.protectors()
	if err != nil {
		return ""
	}
	p, known := protectors[kind]
	if !known {
		return "this kind needs a newer keybroker"
	}
	d, ok := p.(seal.Describer)
	if !ok {
		return ""
	}
	text, err := d.Describe(params)
	if err != nil {
		return err.Error()
	}
	return text
}
