package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"keybroker/derive"
	"keybroker/internal/config"
	"keybroker/internal/daemon"
	"keybroker/seal"
	"keybroker/seal/passphrase"
	"keybroker/seal/tpm2"
)

// Descriptors that the broker gives the opener.
const (
	openerPageFD   = 3 // an empty secret page
	openerStatusFD = 4 // a pipe for daemon.OpenerReport lines
	openerUnlockFD = 5 // optional: the listener on which `keybroker unlock` brings a passphrase
)

// openerFlags are what the broker tells the opener.
type openerFlags struct {
	realm          string
	tpm            string
	order          string
	pin            string
	passphraseFile string
}

func newKeyholderOpenCommand(g *globals) *cobra.Command {
	var f openerFlags
	c := &cobra.Command{
		Use:    "keyholder-open",
		Short:  "Open the realm into a secret page (started by the broker alone)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := hardenProcess(); err != nil {
				return err
			}
			o, err := newOpener(g, &f)
			if err != nil {
				return usageError{err}
			}
			return o.run(cmd.Context())
		},
	}
	c.Flags().StringVar(&f.realm, "realm", "", "the realm `FILE`")
	c.Flags().StringVar(&f.tpm, "tpm", tpm2.DefaultPath, "the TPM: a device or a Unix `SOCKET`")
	c.Flags().StringVar(&f.order, "order", strings.Join(config.Kinds(), ","), "`KINDS` of slots to try, in this order, and no others")
	c.Flags().StringVar(&f.pin, "pin", "", "the only `REALM` to open")
	c.Flags().StringVar(&f.passphraseFile, "passphrase-file", "", "`FILE` with the passphrase")
	return c
}

// An opener is the process that touches TPM, tokens and passphrases, fills the page, and ends; its memory ends with it.
type opener struct {
	realm  string
	order  []string
	pin    *seal.RealmID
	access slotAccess
	page   *os.File
	status *os.File
	unlock *net.UnixListener // or nil
}

func newOpener(g *globals, f *openerFlags) (*opener, error) {
	o := &opener{
		realm:  f.realm,
		order:  strings.Split(f.order, ","),
		access: slotAccess{tpm: f.tpm, open: g.passphraseFrom(f.passphraseFile, "", false)},
		page:   os.NewFile(openerPageFD, "page"),
		status: os.NewFile(openerStatusFD, "status"),
	}
	if f.realm == "" {
		return nil, errors.New("no --realm is given: the broker starts this command")
	}
	for _, kind := range o.order {
		if err := checkKind(kind); err != nil {
			return nil, err
		}
	}
	if f.pin != "" {
		id, err := seal.ParseRealmID(f.pin)
		if err != nil {
			return nil, err
		}
		o.pin = &id
	}
	if _, err := derive.PageKind(o.page); err != nil {
		return nil, fmt.Errorf("descriptor %d is no secret page: the broker starts this command", openerPageFD)
	}
	unix.CloseOnExec(openerPageFD)
	unix.CloseOnExec(openerStatusFD)
	return o, o.inheritListener()
}

// inheritListener takes descriptor 5 if it is a listening Unix socket. If none was given it may be one of Go's own by now.
func (o *opener) inheritListener() error {
	listens, err := unix.GetsockoptInt(openerUnlockFD, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listens != 1 {
		return nil
	}
	f := os.NewFile(openerUnlockFD, "unlock")
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return fmt.Errorf("taking the unlock listener: %w", err)
	}
	u, ok := l.(*net.UnixListener)
	if !ok {
		return fmt.Errorf("descriptor %d is no listening Unix socket", openerUnlockFD)
	}
	o.unlock = u
	return nil
}

// run opens the realm, fills the page, and says so. After a failure the page is empty.
func (o *opener) run(ctx context.Context) error {
	err := o.open(ctx)
	if err == nil {
		return nil
	}
	o.report(daemon.OpenerReport{State: daemon.OpenerFailed, Why: errorLine(err)})
	return errSilent
}

func (o *opener) open(ctx context.Context) error {
	realm, err := o.openBy(ctx, o.access, o.unattended())
	if err == nil {
		return o.finish(realm)
	}
	if !errors.Is(err, seal.ErrNoSlot) || !o.canWait() {
		return err
	}
	return o.waitForPassphrase(ctx, waitReason(err))
}

// unattended returns the kinds to try without anybody.
func (o *opener) unattended() []string {
	kinds := []string{}
	for _, kind := range o.order {
		if kind != passphrase.Kind || !o.access.open.human {
			kinds = append(kinds, kind)
		}
	}
	return kinds
}

// openBy opens the realm by slots of some kinds. The file is read anew each time: a slot may have been added meanwhile.
func (o *opener) openBy(ctx context.Context, a slotAccess, kinds []string) (*seal.Opened, error) {
	file, err := seal.Load(o.realm)
	if err != nil {
		return nil, err
	}
	protectors, err := a.protectors()
	if err != nil {
		return nil, err
	}
	return file.Open(ctx, seal.OpenConfig{Protectors: protectors, RealmID: realmIDOf, Order: kinds, Pin: o.pin})
}

// canWait reports whether a passphrase could open the realm, and somebody can bring it.
func (o *opener) canWait() bool {
	if o.unlock == nil || !slices.Contains(o.order, passphrase.Kind) {
		return false
	}
	file, err := seal.Load(o.realm)
	return err == nil && slices.ContainsFunc(file.Slots(), func(s seal.Slot) bool { return s.Kind == passphrase.Kind })
}

func waitReason(err error) string {
	var none *seal.NoSlotError
	if errors.As(err, &none) && len(none.Slots) == 0 {
		return "a passphrase opens it: `keybroker unlock`"
	}
	return errorLine(err) + "; a passphrase opens it: `keybroker unlock`"
}

// waitForPassphrase tries what `keybroker unlock` brings, until one opens the realm.
func (o *opener) waitForPassphrase(ctx context.Context, why string) error {
	if err := o.report(daemon.OpenerReport{State: daemon.OpenerWaiting, Why: why}); err != nil {
		return err
	}
	return serveUnlock(ctx, o.unlock, func(octets []byte) error {
		source := passphraseSource{get: func(context.Context) ([]byte, error) { return slices.Clone(octets), nil }}
		realm, err := o.openBy(ctx, slotAccess{tpm: o.access.tpm, open: source}, []string{passphrase.Kind})
		if err != nil {
			return err
		}
		return o.finish(realm)
	})
}

// finish fills the page and reports the slot.
func (o *opener) finish(realm *seal.Opened) error {
	defer realm.Close()
	var masters []derive.Master
	defer func() {
		for _, m := range masters {
			m.Wipe()
		}
	}()
	for _, octets := range realm.Masters() {
		m, err := derive.NewMaster(octets)
		if err != nil {
			return err
		}
		masters = append(masters, m)
	}
	if err := derive.FillPage(o.page, masters); err != nil {
		return err
	}
	return o.report(daemon.OpenerReport{State: daemon.OpenerOpened, Slot: realm.Slot().ID.String(), Kind: realm.Slot().Kind})
}

func (o *opener) report(r daemon.OpenerReport) error {
	line, err := json.Marshal(&r)
	if err != nil {
		return fmt.Errorf("reporting to the broker: %w", err)
	}
	if _, err := o.status.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("reporting to the broker: %w", err)
	}
	return nil
}
