package main

import "github.com/spf13/cobra"

// commands are all commands of keybroker, in the order of a broker's life.
func commands(g *globals) []*cobra.Command {
	return []*cobra.Command{
		newInitCommand(g), newServeCommand(g), newStatusCommand(g), newIdentityCommand(g), newVMCommand(g), newExplainCommand(g),
		newPolicyCommand(g), newKeyCommand(g), newSlotCommand(g), newLockCommand(g), newUnlockCommand(g), newAuditCommand(g),
		newMeasureCommand(g), newIDBlockCommand(g), newEndorsementsCommand(g), newDoctorCommand(g), newHookCommand(g), newRelayCommand(g), newManCommand(g), newVersionCommand(g),
		newKeyholderOpenCommand(g), newKeyholderServeCommand(g),
	}
}
