package main

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"

	"keybroker/derive"
	"keybroker/internal/audit"
	"keybroker/internal/daemon"
	"keybroker/internal/store"
	"keybroker/seal"
)

// record writes what this command itself did into the audit log, on disk when it returns. While a broker holds the log it is
// store.ErrHeld.
func (g *globals) record(s *derive.Schedule, records ...audit.Record) error {
	paths, err := g.paths()
	if err != nil {
		return err
	}
	state, err := store.Open(paths.Store)
	if err != nil {
		return err
	}
	defer state.Close()
	log, err := audit.Open(audit.Config{
		Dir: paths.AuditDir, Realm: s.RealmID().String(), Logger: slog.New(slog.DiscardHandler), Reserve: -1,
		Sign:     func(_ context.Context, fields ...[]byte) ([]byte, error) { return s.Sign(derive.LabelAudit, fields...) },
		LoadHead: func() (audit.Head, error) { return daemon.LoadHead(state) },
		SaveHead: func(h audit.Head) error { return daemon.SaveHead(state, h) },
	})
	if err != nil {
		return err
	}
	defer log.Close(context.Background())
	for _, r := range records {
		r.Caller = &audit.Caller{UID: uint32(os.Getuid()), PID: int32(os.Getpid())}
		if _, err := log.Append(r, audit.Durable); err != nil {
			return err
		}
	}
	return nil
}

// recordSlots records a change of the realm file that was made already: in the log itself, or by the broker that holds it, which
// looks for itself. A change that cannot be recorded stays made: whoever may write the file may do without this command.
func (g *globals) recordSlots(ctx context.Context, master []byte, cause string, before, after []seal.Slot) {
	var records []audit.Record
	for _, change := range daemon.SlotChanges(before, after) {
		records = append(records, audit.Record{Event: audit.EventSlot, Reason: cause + change})
	}
	s, err := scheduleOf(master)
	if err == nil {
		defer s.Wipe()
		err = g.record(s, records...)
	}
	if errors.Is(err, store.ErrHeld) || errors.Is(err, audit.ErrHeld) {
		err = g.ask(ctx, http.MethodPost, "/v1/realm-changed", nil)
	}
	if err != nil {
		g.warn("this change of the realm is made, and is not in the audit log: %s", errorLine(err))
	}
}
