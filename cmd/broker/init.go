package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"keybroker/internal/config"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

// defaultPCRs is the one that says which keys Secure Boot trusts: it changes when somebody else's code may boot, and not with
// every kernel.
const defaultPCRs = "sha256:7"

// serviceUser is who the broker runs as; realm.json is its own.
const serviceUser = "keybroker"

// initFlags are what `keybroker init` is told.
type initFlags struct {
	slots          []string
	importFile     string
	tpm            string
	pcrs           string
	passphraseFile string
}

func newInitCommand(g *globals) *cobra.Command {
	var f initFlags
	c := &cobra.Command{
		Use:   "init --slot KIND [--slot KIND]",
		Short: "Make a realm: a master, and the keyslots that open it",
		Long: `Make a realm in the state folder: a new master, or the one that --import names, and the keyslots that open it.
Each slot alone opens the realm. A tpm2 slot opens without anybody, on this machine alone; a passphrase slot opens anywhere.
The same master is the same realm with the same keys on every machine.`,
		Example: `  keybroker init --slot tpm2 --slot passphrase
  keybroker init --slot tpm2 --pcrs sha256:7+11 --import master.bin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return usageError{err}
			}
			return g.initRealm(cmd.Context(), &f)
		},
	}
	c.Flags().StringArrayVar(&f.slots, "slot", nil, "`KIND` of a slot: tpm2 or passphrase; repeat for both")
	c.RegisterFlagCompletionFunc("slot", cobra.FixedCompletions(config.Kinds(), cobra.ShellCompDirectiveNoFileComp))
	c.Flags().StringVar(&f.importFile, "import", "", "`FILE` with a master of 32 raw octets, instead of a new one; - is standard input")
	c.Flags().StringVar(&f.tpm, "tpm", "", "the TPM: a device, or a software TPM's Unix `SOCKET` (default: broker.toml's, or "+tpm2.DefaultPath+")")
	c.Flags().StringVar(&f.pcrs, "pcrs", defaultPCRs, "`BANK:PCRS` that the tpm2 slot is bound to, as sha256:0+7+11")
	c.Flags().StringVar(&f.passphraseFile, "passphrase-file", "", "`FILE` with the passphrase, less one newline at its end; - is standard input")
	return c
}

// check finds the mistakes that need no look at the machine.
func (f *initFlags) check() error {
	if len(f.slots) == 0 {
		return errors.New("no --slot is given: want --slot tpm2, --slot passphrase, or both")
	}
	for i, kind := range f.slots {
		if err := checkKind(kind); err != nil {
			return err
		}
		if slices.Contains(f.slots[:i], kind) {
			return fmt.Errorf("--slot %s is given twice; `keybroker slot add` makes further ones", kind)
		}
	}
	switch {
	case f.passphraseFile != "" && !slices.Contains(f.slots, passphrase.Kind):
		return errors.New("--passphrase-file is given without --slot passphrase")
	case f.passphraseFile == "-" && f.importFile == "-":
		return errors.New("--import and --passphrase-file cannot both be standard input")
	}
	_, err := tpm2.ParseSelection(f.pcrs)
	return err
}

func checkKind(kind string) error {
	if !slices.Contains(config.Kinds(), kind) {
		return fmt.Errorf("slots of kind %q are not known: want %s", kind, strings.Join(config.Kinds(), " or "))
	}
	return nil
}

// initRealm makes the realm in memory first, so that a failure leaves nothing behind.
func (g *globals) initRealm(ctx context.Context, f *initFlags) error {
	if err := hardenProcess(); err != nil {
		return err
	}
	paths, err := g.paths()
	if err != nil {
		return err
	}
	if !missing(paths.Realm) {
		return realmHint(fmt.Errorf("%w: %s", seal.ErrExists, paths.Realm))
	}
	master, err := f.master(g)
	if err != nil {
		return err
	}
	defer clear(master)
	realm, err := seal.Create(master, realmIDOf)
	if err != nil {
		return err
	}
	defer realm.Close()
	if err := g.addSlots(ctx, realm, f); err != nil {
		return realmHint(err)
	}
	if err := storeRealm(ctx, realm, paths); err != nil {
		return realmHint(err)
	}
	g.recordSlots(ctx, master, "a new realm: ", nil, realm.File().Slots())
	return g.reportRealm(realm, master)
}

// master reads the master to import, or makes one.
func (f *initFlags) master(g *globals) ([]byte, error) {
	if f.importFile == "" {
		master := make([]byte, seal.MasterSize)
		rand.Read(master)
		return master, nil
	}
	if f.importFile == "-" {
		return readMaster(g.stdin)
	}
	file, err := g.openSecret(f.importFile)
	if err != nil {
		return nil, fmt.Errorf("importing a master: %w", err)
	}
	defer file.Close()
	return readMaster(file)
}

// readMaster takes 32 octets and nothing else. Its errors say nothing of what was read.
func readMaster(r io.Reader) ([]byte, error) {
	octets, err := io.ReadAll(io.LimitReader(r, 4096))
	if err != nil {
		return nil, fmt.Errorf("importing a master: %w", err)
	}
	if len(octets) == seal.MasterSize {
		if bytes.Count(octets, octets[:1]) == seal.MasterSize {
			return nil, errors.New("importing a master: all its octets are the same, so it is no secret")
		}
		return octets, nil
	}
	defer clear(octets)
	err = fmt.Errorf("importing a master: want %d raw octets, got %d", seal.MasterSize, len(octets))
	switch len(octets) {
	case seal.MasterSize + 1:
		return nil, hintedError{err, "is there a newline at its end? `head -c 32` cuts it off"}
	case 2 * seal.MasterSize, 2*seal.MasterSize + 1:
		return nil, hintedError{err, "if it is hexadecimal, `xxd -r -p` makes raw octets of it"}
	case 44, 45:
		return nil, hintedError{err, "if it is base64, `base64 -d` makes raw octets of it"}
	}
	return nil, err
}

func (g *globals) addSlots(ctx context.Context, realm *seal.Opened, f *initFlags) error {
	pcrs, err := tpm2.ParseSelection(f.pcrs)
	if err != nil {
		return err
	}
	a := slotAccess{tpm: tpm2.DefaultPath, pcrs: pcrs, enrolled: g.passphraseFrom(f.passphraseFile, "New passphrase", true)}
	if slices.Contains(f.slots, tpm2.Kind) {
		a.tpm = g.tpmPath(f.tpm)
	}
	protectors, err := a.protectors()
	if err != nil {
		return err
	}
	for _, kind := range f.slots {
		if _, err := realm.AddSlot(ctx, kind, protectors[kind]); err != nil {
			return err
		}
	}
	return nil
}

// storeRealm writes realm.json, in a folder that it makes if need be, for the broker's user if there is one.
func storeRealm(ctx context.Context, realm *seal.Opened, paths config.Paths) error {
	owner, err := realmOwner()
	if err != nil {
		return err
	}
	if err := makeStateDir(paths.StateDir, owner); err != nil {
		return err
	}
	l, err := lockRealm(ctx, paths)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Create(realm, owner)
}

// realmOwner is the broker's user, when root makes a realm for it; else nil.
func realmOwner() (*seal.Owner, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup(serviceUser)
	if errors.As(err, new(user.UnknownUserError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking up user %s: %w", serviceUser, err)
	}
	uid, uidErr := strconv.Atoi(u.Uid)
	gid, gidErr := strconv.Atoi(u.Gid)
	if err := errors.Join(uidErr, gidErr); err != nil {
		return nil, fmt.Errorf("looking up user %s: %w", serviceUser, err)
	}
	return &seal.Owner{UID: uid, GID: gid}, nil
}

// makeStateDir makes the state folder, for its owner alone. One that exists is left as it is.
func makeStateDir(dir string, owner *seal.Owner) error {
	if !missing(dir) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the state folder: %w", err)
	}
	if owner == nil {
		return nil
	}
	if err := os.Lchown(dir, owner.UID, owner.GID); err != nil {
		return fmt.Errorf("making the state folder: %w", err)
	}
	return nil
}

// reportRealm prints what was made, and warns of a realm that one dead mainboard ends.
func (g *globals) reportRealm(realm *seal.Opened, master []byte) error {
	pin, err := identityOf(master)
	if err != nil {
		return err
	}
	fmt.Fprintf(g.stdout, "realm     %s\n", realm.File().RealmID())
	fmt.Fprintf(g.stdout, "identity  %s\n", pin)
	portable := false
	for _, s := range realm.File().Slots() {
		fmt.Fprintf(g.stdout, "slot      %s  %s  %s\n", s.ID, s.Kind, describe(s.Kind, s.Params))
		portable = portable || s.Kind != tpm2.Kind
	}
	if !portable {
		g.warn("this realm dies with this mainboard's TPM: nothing else opens it, and its keys cannot be made again")
		g.hint("`keybroker slot add passphrase` adds a slot that opens anywhere")
	}
	return nil
}
