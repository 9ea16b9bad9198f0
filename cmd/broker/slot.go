package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"keybroker/internal/config"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

func newSlotCommand(g *globals) *cobra.Command {
	c := &cobra.Command{
		Use:   "slot",
		Short: "List, add, remove and test the keyslots that open the realm",
	}
	c.AddCommand(newSlotListCommand(g), newSlotAddCommand(g), newSlotRemoveCommand(g), newSlotTestCommand(g))
	return c
}

// A slotLine is one slot in the JSON of `slot list`.
type slotLine struct {
	ID          string    `json:"id"`
	Kind        string    `json:"kind"`
	Created     time.Time `json:"created"`
	Description string    `json:"description"`
}

// A slotList is the JSON of `slot list`.
type slotList struct {
	Realm       string     `json:"realm"`
	Generations int        `json:"generations"`
	Require     int        `json:"require"`
	Slots       []slotLine `json:"slots"`
}

func newSlotListCommand(g *globals) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "list",
		Short: "List the keyslots; the realm stays closed",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			file, _, err := g.loadRealm()
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(g.stdout, listSlots(file))
			}
			return g.printSlots(file)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func listSlots(file *seal.File) slotList {
	l := slotList{Realm: file.RealmID().String(), Generations: file.Generations(), Require: file.Require()}
	for _, s := range file.Slots() {
		l.Slots = append(l.Slots, slotLine{ID: s.ID.String(), Kind: s.Kind, Created: s.Created, Description: describe(s.Kind, s.Params)})
	}
	return l
}

func (g *globals) printSlots(file *seal.File) error {
	t := tabwriter.NewWriter(g.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tKIND\tCREATED\tDESCRIPTION")
	for _, s := range listSlots(file).Slots {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.ID, s.Kind, s.Created.Format(time.RFC3339), s.Description)
	}
	return t.Flush()
}

// addFlags are what `slot add` is told.
type addFlags struct {
	openFlags
	pcrs       string
	unlockFile string
}

func newSlotAddCommand(g *globals) *cobra.Command {
	var f addFlags
	c := &cobra.Command{
		Use:   "add KIND",
		Short: "Add a keyslot of kind tpm2 or passphrase",
		Long: `Add a keyslot. The realm is opened by a slot that it has: tpm2 slots are tried first, then the passphrase is asked for.
For a new passphrase slot --passphrase-file is the new passphrase, and --unlock-passphrase-file that of an old slot.`,
		Example: `  keybroker slot add passphrase
  keybroker slot add tpm2 --pcrs sha256:7+11`,
		Args:      cobra.ExactArgs(1),
		ValidArgs: config.Kinds(),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(args[0]); err != nil {
				return usageError{err}
			}
			return g.addSlot(cmd.Context(), args[0], &f)
		},
	}
	f.add(c)
	c.Flags().StringVar(&f.pcrs, "pcrs", defaultPCRs, "`BANK:PCRS` that a tpm2 slot is bound to, as sha256:0+7+11")
	c.Flags().StringVar(&f.unlockFile, "unlock-passphrase-file", "", "`FILE` with the passphrase of a slot that the realm has; - is standard input")
	return c
}

func (f *addFlags) check(kind string) error {
	if err := checkKind(kind); err != nil {
		return err
	}
	if f.passphraseFile == "-" && f.unlockFile == "-" {
		return errors.New("--passphrase-file and --unlock-passphrase-file cannot both be standard input")
	}
	_, err := tpm2.ParseSelection(f.pcrs)
	return err
}

// access tells the passphrase that opens from the new one.
func (f *addFlags) access(g *globals, kind string) (*slotAccess, error) {
	pcrs, err := tpm2.ParseSelection(f.pcrs)
	if err != nil {
		return nil, err
	}
	openFile, newFile := f.unlockFile, ""
	if kind == passphrase.Kind {
		newFile = f.passphraseFile
	} else if openFile == "" {
		openFile = f.passphraseFile
	}
	return &slotAccess{
		tpm: g.tpmPath(f.tpm), pcrs: pcrs,
		open:     g.passphraseFrom(openFile, "Passphrase of a slot that the realm has", false),
		enrolled: g.passphraseFrom(newFile, "Passphrase of the new slot", true),
	}, nil
}

func (g *globals) addSlot(ctx context.Context, kind string, f *addFlags) error {
	a, err := f.access(g, kind)
	if err != nil {
		return err
	}
	var added seal.Slot
	err = g.changeRealm(ctx, a, func(file *seal.File, c seal.OpenConfig) (*seal.Opened, error) {
		realm, err := file.Open(ctx, c)
		if err != nil {
			return nil, err
		}
		if added, err = realm.AddSlot(ctx, kind, c.Protectors[kind]); err != nil {
			realm.Close()
			return nil, err
		}
		return realm, nil
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(g.stdout, "added slot %s  %s  %s\n", added.ID, added.Kind, describe(added.Kind, added.Params))
	return err
}

// changeRealm opens and changes the realm by f, under the file's lock, saves it, and records what changed.
func (g *globals) changeRealm(ctx context.Context, a *slotAccess, f func(*seal.File, seal.OpenConfig) (*seal.Opened, error)) error {
	if err := hardenProcess(); err != nil {
		return err
	}
	_, paths, err := g.loadRealm() // before anybody waits for the lock, or makes its file
	if err != nil {
		return err
	}
	l, err := lockRealm(ctx, paths)
	if err != nil {
		return err
	}
	defer l.Close()
	file, err := l.Load()
	if err != nil {
		return realmHint(err)
	}
	c, err := g.openConfig(a)
	if err != nil {
		return err
	}
	before := file.Slots()
	realm, err := f(file, c)
	if err != nil {
		return realmHint(err)
	}
	defer realm.Close()
	if err := l.Save(realm); err != nil {
		return realmHint(err)
	}
	g.recordSlots(ctx, realm.Masters()[0], "", before, realm.File().Slots())
	return nil
}

func newSlotRemoveCommand(g *globals) *cobra.Command {
	var f openFlags
	var force bool
	c := &cobra.Command{
		Use:   "remove ID",
		Short: "Remove a keyslot, if another one opens the realm",
		Long: `Remove a keyslot. The realm is opened by another slot first, which proves that the removed one is not the last that works;
with --force it is removed even if it is.
This is no revocation: a copy of realm.json from before still opens by the removed slot.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := seal.ParseSlotID(args[0])
			if err != nil {
				return usageError{err}
			}
			return g.removeSlot(cmd.Context(), id, &f, force)
		},
		ValidArgsFunction: g.completeSlot,
	}
	f.add(c)
	c.Flags().BoolVar(&force, "force", false, "remove the slot even if no other one opens the realm")
	return c
}

func (g *globals) removeSlot(ctx context.Context, id seal.SlotID, f *openFlags, force bool) error {
	left := 0
	err := g.changeRealm(ctx, f.access(g), func(file *seal.File, c seal.OpenConfig) (*seal.Opened, error) {
		left = len(file.Slots()) - 1
		if !hasSlot(file, id) {
			return nil, fmt.Errorf("removing slot %s: %w", id, seal.ErrSlotNotFound)
		}
		if !force {
			c.Except = &id
		}
		realm, err := file.Open(ctx, c)
		if errors.Is(err, seal.ErrNoSlot) && !force {
			return nil, hintedError{
				fmt.Errorf("not removing slot %s: no other slot opens the realm now: %w", id, err),
				"`keybroker slot add` makes another one first; --force removes the last slot that works all the same",
			}
		}
		if err != nil {
			return nil, err
		}
		if err := realm.RemoveSlot(id); err != nil {
			realm.Close()
			return nil, err
		}
		return realm, nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(g.stdout, "removed slot %s\n", id)
	g.warn("this is no revocation: a copy of realm.json from before still opens by slot %s", id)
	g.hint("only a new realm, with other keys, ends what such a copy opens")
	if left == 0 {
		g.warn("NO KEYSLOT IS LEFT: once the broker stops, or `keybroker lock` closes the realm, nothing opens it again, and no slot can be added")
		g.hint("keep the broker running and restore realm.json from a copy, or use the master that you have: `keybroker init --import FILE`; `keybroker slot add` needs a slot that opens")
	}
	return nil
}

func hasSlot(file *seal.File, id seal.SlotID) bool {
	for _, s := range file.Slots() {
		if s.ID == id {
			return true
		}
	}
	return false
}

func newSlotTestCommand(g *globals) *cobra.Command {
	var f openFlags
	var all bool
	c := &cobra.Command{
		Use:   "test [ID | --all]",
		Short: "Say whether a keyslot, or each, opens the realm now",
		Long:  "Open the realm by one keyslot, or by each in turn, and close it again. The exit status is 1 if any of them does not open.",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if all && len(args) > 0 {
				return usageError{errors.New("want a slot's id or --all, got both")}
			}
			var only *seal.SlotID
			if len(args) > 0 {
				id, err := seal.ParseSlotID(args[0])
				if err != nil {
					return usageError{err}
				}
				only = &id
			}
			return g.testSlots(cmd.Context(), only, &f)
		},
		ValidArgsFunction: g.completeSlot,
	}
	f.add(c)
	c.Flags().BoolVar(&all, "all", false, "test every slot, as without ID")
	return c
}

// testSlots tests one slot, or all if only is nil.
func (g *globals) testSlots(ctx context.Context, only *seal.SlotID, f *openFlags) error {
	if err := hardenProcess(); err != nil {
		return err
	}
	file, _, err := g.loadRealm()
	if err != nil {
		return err
	}
	if only != nil && !hasSlot(file, *only) {
		return realmHint(fmt.Errorf("testing slot %s: %w", *only, seal.ErrSlotNotFound))
	}
	c, err := g.openConfig(f.access(g))
	if err != nil {
		return err
	}
	failed := len(file.Slots()) == 0
	for _, s := range file.Slots() {
		if only != nil && s.ID != *only {
			continue
		}
		err := file.Test(ctx, s.ID, c)
		if err == nil {
			fmt.Fprintf(g.stdout, "%s  %s  opens\n", s.ID, s.Kind)
			continue
		}
		failed = true
		fmt.Fprintf(g.stdout, "%s  %s  does not open: %s\n", s.ID, s.Kind, errorLine(err))
		if h := (hintedError{}); errors.As(realmHint(err), &h) {
			g.hint("%s", h.hint)
		}
	}
	if failed {
		return errSilent
	}
	return nil
}

// completeSlot completes slot ids.
func (g *globals) completeSlot(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	file, _, err := g.loadRealm()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var ids []string
	for _, s := range file.Slots() {
		ids = append(ids, s.ID.String()+"\t"+s.Kind)
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}
