package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"keybroker/derive"
	"keybroker/internal/audit"
	"keybroker/internal/store"
)

// deriveFlags are those of `key derive`.
type deriveFlags struct {
	open   openFlags
	form   keyForm
	vm     string
	epoch  uint32
	length int
}

func newKeyDeriveCommand(g *globals) *cobra.Command {
	var f deriveFlags
	c := &cobra.Command{
		Use:   "derive NAME",
		Short: "Derive a key without the broker (break-glass)",
		Long: `Open the realm in this process and derive the key of a service, or with --vm of a virtual machine, past policy and
tickets. It is for recovery: the broker must be stopped, it says loudly what it does, and it is in the audit log.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.form.check(g.stdout); err != nil {
				return usageError{err}
			}
			if err := f.check(args[0]); err != nil {
				return usageError{err}
			}
			return g.breakGlass(cmd.Context(), args[0], &f)
		},
	}
	f.open.add(c)
	f.form.flags(c)
	c.Flags().StringVar(&f.vm, "vm", "", "`UUID` of the virtual machine (the subject) whose key NAME is")
	c.Flags().Uint32Var(&f.epoch, "epoch", 1, "which `EPOCH` of the key")
	c.Flags().IntVar(&f.length, "length", 32, "`OCTETS` of the key, 32 or 64")
	return c
}

func (f *deriveFlags) check(name string) error {
	if err := errors.Join(derive.CheckKeyName(name), derive.CheckKeyLength(f.length)); err != nil {
		return err
	}
	if f.vm == "" {
		return nil
	}
	return derive.CheckSubject(f.vm)
}

// breakGlass derives one key: no record, no key, here too.
func (g *globals) breakGlass(ctx context.Context, name string, f *deriveFlags) error {
	if err := g.checkNoBroker(); err != nil {
		return err
	}
	g.warn("break-glass: deriving a key past policy and tickets; this is recorded in the audit log")
	realm, err := g.openRealm(ctx, &f.open)
	if err != nil {
		return err
	}
	defer realm.Close()
	schedule, err := scheduleOf(realm.Masters()[0])
	if err != nil {
		return err
	}
	defer schedule.Wipe()
	if err := g.recordBreakGlass(schedule, name, f); err != nil {
		return noRecord(err)
	}
	octets, wipe, err := f.derive(schedule, name)
	if err != nil {
		return err
	}
	defer wipe()
	return f.form.write(g.stdout, octets)
}

// checkNoBroker finds out before anybody types a passphrase that it would be for nothing.
func (g *globals) checkNoBroker() error {
	paths, err := g.paths()
	if err != nil {
		return err
	}
	s, err := store.OpenReadOnly(paths.Store)
	if errors.Is(err, store.ErrHeld) {
		return noRecord(err)
	}
	if err == nil {
		s.Close()
	}
	return nil
}

func noRecord(err error) error {
	if errors.Is(err, store.ErrHeld) || errors.Is(err, audit.ErrHeld) {
		return hintedError{fmt.Errorf("no record, no key, and a broker holds the audit log: %w", err), "ask the broker by `keybroker key get`, or " + stopBroker + " first"}
	}
	return fmt.Errorf("no record, no key: %w", err)
}

func (f *deriveFlags) derive(s *derive.Schedule, name string) ([]byte, func(), error) {
	if f.vm == "" {
		k, err := s.ServiceKey(name, f.epoch, f.length)
		if err != nil {
			return nil, nil, err
		}
		octets, err := k.Octets()
		return octets, k.Wipe, err
	}
	k, err := s.VMKey(derive.VMKeyID{Tier: "vm", Subject: f.vm, Name: name, Epoch: f.epoch, Length: f.length})
	if err != nil {
		return nil, nil, err
	}
	octets, err := k.Octets()
	return octets, k.Wipe, err
}

// recordBreakGlass writes the audit record. It fails while a broker has the log.
func (g *globals) recordBreakGlass(s *derive.Schedule, name string, f *deriveFlags) error {
	r := audit.Record{
		Event: audit.EventBreakGlass, Decision: audit.Granted, Tier: "service", Subject: name, Names: []string{name}, Epochs: []uint32{f.epoch},
	}
	if f.vm != "" {
		r.Tier, r.Subject = "vm", f.vm
	}
	return g.record(s, r)
}
